"""Looks at results: absent classes, margins, examples."""
