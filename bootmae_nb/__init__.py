"""Masked image pretraining in notebooks: BootMAE, MAE and dBOT on timm encoders and fastai."""
__version__ = "0.1.0"
