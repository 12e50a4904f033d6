"""Reports: a page of what work directories hold."""
