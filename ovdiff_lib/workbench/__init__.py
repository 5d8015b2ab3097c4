"""What measures, compares, draws and reports; the method never imports it."""
