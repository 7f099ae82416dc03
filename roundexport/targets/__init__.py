"""Export targets, one folder each: lowering, rewrite rules, client files, legality."""
