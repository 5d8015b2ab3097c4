"""Step 1, Sec. 3.1 and 3.2: draw the support images of a category and record which pixels its name attends to."""
