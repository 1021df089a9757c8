"""Denoising: a blind-spot UNet whose weights are predicted for noisy images, its training, PSNR and SSIM."""

from timm_pudnet.denoising.metrics import psnr, ssim
from timm_pudnet.denoising.noise import add_noise, blind_spot_loss, blind_spots
from timm_pudnet.denoising.posterior import estimate_noise
from timm_pudnet.denoising.predict import (
    calibrated_denoiser,
    denoiser_of,
    joined,
    noisy_patches,
    predict_denoiser,
    shrunk,
    sketch_of,
    whitened,
)
from timm_pudnet.denoising.tiles import denoise, fused
from timm_pudnet.denoising.training import PatchBank, load_patches, meta_train_denoiser, train_plain_denoiser
from timm_pudnet.denoising.unet import BlindSpotUNet

__all__ = [
    'BlindSpotUNet',
    'PatchBank',
    'add_noise',
    'blind_spot_loss',
    'blind_spots',
    'calibrated_denoiser',
    'denoise',
    'denoiser_of',
    'estimate_noise',
    'fused',
    'joined',
    'load_patches',
    'meta_train_denoiser',
    'noisy_patches',
    'predict_denoiser',
    'psnr',
    'shrunk',
    'sketch_of',
    'ssim',
    'train_plain_denoiser',
    'whitened',
]
