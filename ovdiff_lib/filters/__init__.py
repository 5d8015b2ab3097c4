"""Step 3a, Sec. 3.4: filters between the bank and the matching: categories that the image does not show, prototypes
that are stuff."""
