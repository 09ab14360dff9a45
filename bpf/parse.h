/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From a frame to "a first SYN from this source to this port", or to the reason why it is none.
 *
 * Ethernet, up to two VLAN tags, IPv4 with options, IPv6 with extension headers, AH, fragments. Takes
 * everything by argument; the host compiler builds the same code for the tests.
 *
 * What an attacker could try: hide the SYN behind header chains, fragments or lying lengths. Whatever
 * cannot be judged is passed and counted under its own reason, never guessed at; strict mode drops it.
 */
#ifndef EDGE_PARSE_H
#define EDGE_PARSE_H

#include "base.h"
#include "abi.h"

#define MAX_VLAN_TAGS 2
/* RFC 8200 knows six kinds, each once (destination options twice); real SYNs carry none or one. */
#define MAX_EXTENSION_HEADERS 8

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define ETHERTYPE_VLAN 0x8100
#define ETHERTYPE_QINQ 0x88a8

#define NEXT_HOP_BY_HOP 0
#define NEXT_TCP 6
#define NEXT_ROUTING 43
#define NEXT_FRAGMENT 44
#define NEXT_ESP 50
#define NEXT_AH 51
#define NEXT_DESTINATION 60

/* Ports and flags. A first fragment may end here (they come in multiples of 8 bytes) and still become a
 * connection, so the rest of the header is not waited for. */
#define TCP_JUDGED_BYTES 16

#define TCP_SYN 0x02
#define TCP_ACK 0x10

struct ethernet_header {
	__u8 destination[6], source[6];
	__be16 type;
};

struct vlan_tag {
	__be16 control, type;
};

struct ipv4_header {
	__u8 version_length, service;
	__be16 total_length, id, fragment;
	__u8 ttl, protocol;
	__be16 checksum;
	__be32 source, destination;
};

struct ipv6_header {
	__be32 version_flow;
	__be16 payload_length;
	__u8 next_header, hop_limit;
	__be32 source[4], destination[4];
};

struct extension_header {
	__u8 next_header, length;
	__be16 fragment;	/* of a fragment header: offset, reserved, more */
	__be32 more;
};

struct tcp_header {
	__be16 source, destination;
	__be32 sequence, acknowledgement;
	__u8 data_offset, flags;
	__be16 window, checksum, urgent;
};

/* What a SYN is judged by; addresses as in the packet, in host order. IPv4 has its address in `lo`. */
struct packet {
	__u64 source_hi, source_lo;
	__u64 destination_hi, destination_lo;
	__u32 ipv4;
	__u32 port;
};

/* Outcome of parse() that is no reason: a first SYN, to be judged. */
#define PARSED_SYN REASONS

INLINE __u64 address_half(const __be32 *word)
{
	return (__u64)FROM_BE32(word[0]) << 32 | FROM_BE32(word[1]);
}

/* The header after IP: `left` bytes belong to the IP packet from `cursor` on (they may end earlier in
 * the frame). First fragments come here too. */
INLINE int parse_tcp(const void *cursor, const void *end, __u64 left, int fragment, struct packet *packet)
{
	const struct tcp_header *tcp = cursor;

	if (left < TCP_JUDGED_BYTES || cursor + TCP_JUDGED_BYTES > end)
		return fragment ? REASON_FRAGMENT : REASON_TRUNCATED;
	if ((tcp->flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return REASON_NOT_SYN;
	if (tcp->data_offset >> 4 < 5)
		return REASON_MALFORMED;
	packet->port = FROM_BE16(tcp->destination);
	return PARSED_SYN;
}

/* Walk from the IP header's next header to TCP. */
INLINE int parse_chain(const void *cursor, const void *end, __u64 left, __u32 next, int fragment, struct packet *packet)
{
	const struct extension_header *header;
	__u64 length;

#pragma nounroll
	for (__u64 i = 0; i < MAX_EXTENSION_HEADERS; i++) {
		if (next == NEXT_TCP)
			return parse_tcp(cursor, end, left, fragment, packet);
		if (next == NEXT_ESP)
			return REASON_ESP;
		if (next != NEXT_AH) {
			if (packet->ipv4)
				return REASON_NOT_TCP;
			if (next != NEXT_HOP_BY_HOP && next != NEXT_DESTINATION && next != NEXT_ROUTING &&
			    next != NEXT_FRAGMENT)
				return REASON_NOT_TCP;
		}
		header = cursor;
		if (left < sizeof(*header) || (const void *)(header + 1) > end)
			return fragment ? REASON_FRAGMENT : REASON_TRUNCATED;
		if (next == NEXT_FRAGMENT) {
			if (FROM_BE16(header->fragment) & 0xfff8)
				return REASON_FRAGMENT;
			fragment |= FROM_BE16(header->fragment) & 1;
			length = 8;
		} else if (next == NEXT_AH) {
			length = ((__u64)header->length + 2) * 4;
		} else {
			length = ((__u64)header->length + 1) * 8;
		}
		if (left < length)
			return fragment ? REASON_FRAGMENT : REASON_MALFORMED;
		left -= length;
		next = header->next_header;
		cursor += length;
	}
	return next == NEXT_TCP ? parse_tcp(cursor, end, left, fragment, packet) : REASON_TOO_MANY_HEADERS;
}

INLINE int parse_ipv4(const void *cursor, const void *end, struct packet *packet)
{
	const struct ipv4_header *ip = cursor;
	__u64 header_length, total_length;
	__u32 fragment;

	if ((const void *)(ip + 1) > end)
		return REASON_TRUNCATED;
	header_length = (ip->version_length & 0x0f) * 4;
	total_length = FROM_BE16(ip->total_length);
	/* BIG TCP writes 0: the frame's own end then bounds it. */
	if (total_length == 0)
		total_length = 0xffff;
	if (ip->version_length >> 4 != 4 || header_length < sizeof(*ip) || total_length < header_length)
		return REASON_MALFORMED;
	fragment = FROM_BE16(ip->fragment);
	packet->ipv4 = 1;
	packet->source_hi = 0;
	packet->source_lo = FROM_BE32(ip->source);
	packet->destination_hi = 0;
	packet->destination_lo = FROM_BE32(ip->destination);
	if (fragment & 0x1fff)
		return ip->protocol == NEXT_TCP || ip->protocol == NEXT_AH ? REASON_FRAGMENT : REASON_NOT_TCP;
	return parse_chain(cursor + header_length, end, total_length - header_length, ip->protocol,
			   (fragment & 0x2000) != 0, packet);
}

INLINE int parse_ipv6(const void *cursor, const void *end, struct packet *packet)
{
	const struct ipv6_header *ip = cursor;
	__u64 payload_length;
	int parsed;

	if ((const void *)(ip + 1) > end)
		return REASON_TRUNCATED;
	if (FROM_BE32(ip->version_flow) >> 28 != 6)
		return REASON_MALFORMED;
	payload_length = FROM_BE16(ip->payload_length);
	/* 0 may stand for a jumbogram (RFC 2675) or BIG TCP: the frame's own end then bounds it. */
	if (payload_length == 0)
		payload_length = 0xffff;
	packet->ipv4 = 0;
	packet->source_hi = address_half(ip->source);
	packet->source_lo = address_half(ip->source + 2);
	packet->destination_hi = address_half(ip->destination);
	packet->destination_lo = address_half(ip->destination + 2);
	parsed = parse_chain(ip + 1, end, payload_length, ip->next_header, 0, packet);
	/* Without a hop-by-hop header 0 means empty, and Linux cuts off what follows. */
	if (parsed == PARSED_SYN && !ip->payload_length && ip->next_header != NEXT_HOP_BY_HOP)
		return REASON_TRUNCATED;
	return parsed;
}

/* A reason, or PARSED_SYN with `packet` filled. */
INLINE int parse(const void *data, const void *end, struct packet *packet)
{
	const struct ethernet_header *ethernet = data;
	const void *cursor = ethernet + 1;
	const struct vlan_tag *tag;
	__u32 type;

	if (cursor > end)
		return REASON_TRUNCATED;
	type = FROM_BE16(ethernet->type);
	for (__u64 i = 0; i < MAX_VLAN_TAGS; i++) {
		if (type != ETHERTYPE_VLAN && type != ETHERTYPE_QINQ)
			break;
		tag = cursor;
		if ((const void *)(tag + 1) > end)
			return REASON_TRUNCATED;
		type = FROM_BE16(tag->type);
		cursor = tag + 1;
	}
	if (type == ETHERTYPE_IPV6)
		return parse_ipv6(cursor, end, packet);
	if (type == ETHERTYPE_IPV4)
		return parse_ipv4(cursor, end, packet);
	return REASON_NOT_IP;
}

#endif
