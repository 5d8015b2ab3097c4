"""Figures of the notebooks and the report."""
