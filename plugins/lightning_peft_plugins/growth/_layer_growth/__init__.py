"""What LayerGrowth alone needs: its operators, the plan of edits, masks on what is new."""
