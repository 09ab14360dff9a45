/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bcc asks; only kprobe programs would care for the answer. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 15, 0)
