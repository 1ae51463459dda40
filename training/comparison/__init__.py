"""Finished runs of next-item models set side by side: one page of tables, one of figures."""
