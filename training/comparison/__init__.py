"""Finished runs set side by side: one page of tables, one of figures.

Modules named `next_item_...` and `click_...` are of one kind of models; the others are shared.
"""
