"""Configuration to trained weights."""

from vlm.train.config import TrainConfig
from vlm.train.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
