"""Denoising with a blind-spot network whose weights were predicted."""
