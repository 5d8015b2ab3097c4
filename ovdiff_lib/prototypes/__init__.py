"""Step 2c: prototypes of a class from its masked features (Eq. 2, 3)."""
