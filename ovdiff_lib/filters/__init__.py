"""Step 3a, Sec. 3.4: filters of the bank before matching: categories not shown, prototypes that are stuff."""
