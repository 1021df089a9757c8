"""Denoising: a blind-spot UNet whose weights are predicted for noisy images, its training, PSNR and SSIM."""
