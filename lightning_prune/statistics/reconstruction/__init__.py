"""Reconstruction: least-squares solutions for the weights that are left, by layer, on calibration batches."""
