"""The demonstration: real SMTP, a real MTA and the real daemon, in network namespaces of their own."""
