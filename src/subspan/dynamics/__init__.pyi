from .control_function import ControlFunctionRegressor, FirstStage, Interval, first_stage
from .linear_invariance import InvarianceTest, LinearInvarianceLoss, linear_invariance_test
from .rep4ex import Rep4Ex, Rep4ExAutoencoder, Rep4ExLoss
from .sliced_gaussian import SlicedGaussianLoss, epps_pulley
from .sub_jepa import SubspaceGaussianRegularizer

__all__ = [
    "ControlFunctionRegressor",
    "FirstStage",
    "Interval",
    "InvarianceTest",
    "LinearInvarianceLoss",
    "Rep4Ex",
    "Rep4ExAutoencoder",
    "Rep4ExLoss",
    "SlicedGaussianLoss",
    "SubspaceGaussianRegularizer",
    "epps_pulley",
    "first_stage",
    "linear_invariance_test",
]
