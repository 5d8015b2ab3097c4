"""The vocabulary doctor: which words will be confused, before and after building."""
