from .control_function import ControlFunctionRegressor, FirstStage, Interval, first_stage
from .information_koopman import (
    InformationKoopmanLoss,
    KoopmanNetwork,
    LatentSteps,
    TemporalInfoNCE,
    VonNeumannEntropy,
    effective_dimension,
    gaussian_latent_information,
)
from .koopman_operator import Forecast, KoopmanOperator
from .koopman_training import KoopmanAutoencoder
from .linear_invariance import InvarianceTest, LinearInvarianceLoss, linear_invariance_test
from .planning import CEMPlanner, InverseDynamics
from .rep4ex import Rep4Ex, Rep4ExAutoencoder, Rep4ExLoss
from .sliced_gaussian import SlicedGaussianLoss, epps_pulley
from .sub_jepa import SubspaceGaussianRegularizer
from .trajectories import rollout_errors, seasonal_naive
from .world_model import ActionPredictor, JEPAWorldModel, straightness

__all__ = [
    "ActionPredictor",
    "CEMPlanner",
    "ControlFunctionRegressor",
    "FirstStage",
    "Forecast",
    "InformationKoopmanLoss",
    "Interval",
    "InvarianceTest",
    "InverseDynamics",
    "JEPAWorldModel",
    "KoopmanAutoencoder",
    "KoopmanNetwork",
    "KoopmanOperator",
    "LatentSteps",
    "LinearInvarianceLoss",
    "Rep4Ex",
    "Rep4ExAutoencoder",
    "Rep4ExLoss",
    "SlicedGaussianLoss",
    "SubspaceGaussianRegularizer",
    "TemporalInfoNCE",
    "VonNeumannEntropy",
    "effective_dimension",
    "epps_pulley",
    "first_stage",
    "gaussian_latent_information",
    "linear_invariance_test",
    "rollout_errors",
    "seasonal_naive",
    "straightness",
]
