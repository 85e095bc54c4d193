from .sliced_gaussian import SlicedGaussianLoss, epps_pulley
from .sub_jepa import SubspaceGaussianRegularizer

__all__ = ["SlicedGaussianLoss", "SubspaceGaussianRegularizer", "epps_pulley"]
