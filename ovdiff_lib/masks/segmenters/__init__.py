"""Segmenters Gamma: what proposes masks for Eq. 1."""
