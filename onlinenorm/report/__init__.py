"""Run folders in, tables, verdicts, curves and a page out; reads files only, so it needs neither torch nor a GPU."""
