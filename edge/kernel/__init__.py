"""Everything that touches the kernel: bpf(2), netlink, nftables. Nothing outside this package does."""
