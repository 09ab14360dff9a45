"""edge-throttler: limits and blocks SMTP connections by IPv6 prefix, in the kernel, on evidence."""
