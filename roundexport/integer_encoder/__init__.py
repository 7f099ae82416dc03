"""BCT's whole encoder: weights and intermediates as integers, calibrated by block statistics, stored, and run."""
