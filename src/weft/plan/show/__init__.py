"""Plans to look at: in words, tables and pictures, on a terminal and as a page."""
