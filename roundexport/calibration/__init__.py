"""The samples that tuning looks at, one file per source."""
