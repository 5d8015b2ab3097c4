"""Step 3b: windows, cosine similarity with the prototypes (Eq. 4), refinement."""
