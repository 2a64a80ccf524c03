"""Helpers of LayerGrowth: its operators, the plan of edits, masks on new units."""
