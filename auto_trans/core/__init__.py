"""Pure arithmetic on layouts, boxes and plans: no files, no MindSpore."""
