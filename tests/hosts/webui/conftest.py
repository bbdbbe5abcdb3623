"""What is in in_host/ runs in a WebUI's own Python alone; see test_webuis.py."""

collect_ignore = ["in_host"]
