/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The challenge: a SYN is answered by a SYN-ACK that acknowledges a cookie instead of the SYN.
 *
 * A real client has asked for no such thing and answers with a RST whose sequence number is the cookie
 * (RFC 9293, 3.5.2 and 3.10.7.3, SYN-SENT: an unacceptable ACK is answered by <SEQ=SEG.ACK><CTL=RST>). So it
 * has shown that it receives at its address, nothing had to be remembered, and the kernel's TCP saw neither.
 * It then sends its SYN again: Linux at once (net/ipv4/tcp_input.c, tcp_rcv_synsent_state_process), FreeBSD,
 * NetBSD and macOS, which reset in the same way (tcp_input.c, TCPS_SYN_SENT, dropwithreset), when their
 * retransmission is due, after 1 to 3 seconds (RFC 6298: at least one).
 *
 * What an attacker could try: guess the cookie (32 bits, a new one each 69 s; at a million a second it takes
 * an hour to prove one connection of one address), learn the key from cookies of its own (SipHash is made
 * to withstand that), use us as a reflector (an answer is never larger than the SYN, and never more of
 * them), or put the SYN behind extension headers, options or fragments (such a SYN is not challenged but
 * judged by the ordinary limit).
 *
 * Pure: compiles with the host compiler too and is tested against Python.
 */
#ifndef EDGE_CHALLENGE_H
#define EDGE_CHALLENGE_H

#include "base.h"
#include "abi.h"
#include "parse.h"

/* How long a cookie is taken: its slot and the one before, 69 s each. */
#define COOKIE_SLOT_BITS 36

/* How long a proof lasts: longer than any stack waits before it sends its SYN again (RFC 6298: 1, 2, 4, 8, ... s). */
#define PROOF_NS 60000000000ull

/* Width of the windows in which SYNs are remembered, to know a late retransmission (RFC 6298: after 1, 3, 7 s). */
#define SEEN_WINDOW_NS 2000000000ull
#define SEEN_BITS 48	/* of a word; the others hold its window */

#define TCP_RST 0x04

/* A frame that holds TCP right behind an IP header without options. */
struct plain {
	__u64 network;	/* bytes before the IP header */
	__u64 ipv4;
	__u64 source_hi, source_lo, destination_hi, destination_lo;
	__u32 ports;	/* source in the upper half */
	__u32 sequence;
	__u32 flags;
};

INLINE __u64 rotate(__u64 x, int by)
{
	return x << by | x >> (64 - by);
}

struct sip {
	__u64 a, b, c, d;
};

INLINE void sip_round(struct sip *s)
{
	s->a += s->b;
	s->b = rotate(s->b, 13) ^ s->a;
	s->a = rotate(s->a, 32);
	s->c += s->d;
	s->d = rotate(s->d, 16) ^ s->c;
	s->a += s->d;
	s->d = rotate(s->d, 21) ^ s->a;
	s->c += s->b;
	s->b = rotate(s->b, 17) ^ s->c;
	s->c = rotate(s->c, 32);
}

INLINE void sip_rounds(struct sip *s, __u64 count)
{
#pragma nounroll
	for (__u64 i = 0; i < count; i++)
		sip_round(s);
}

#define SIP_WORDS 5

/* SipHash-2-4 of five words (Aumasson, Bernstein: INDOCRYPT 2012). Loops, so that the text stays small. */
INLINE __u64 siphash(const __u64 *key, const __u64 *words)
{
	struct sip s = {
		.a = key[0] ^ 0x736f6d6570736575ull,
		.b = key[1] ^ 0x646f72616e646f6dull,
		.c = key[0] ^ 0x6c7967656e657261ull,
		.d = key[1] ^ 0x7465646279746573ull,
	};

#pragma nounroll
	for (__u64 i = 0; i <= SIP_WORDS; i++) {
		/* the last word is the length in bytes */
		__u64 word = i < SIP_WORDS ? words[i] : (8ull * SIP_WORDS) << 56;

		s.d ^= word;
		sip_rounds(&s, 2);
		s.a ^= word;
	}
	s.c ^= 0xff;
	sip_rounds(&s, 4);
	return s.a ^ s.b ^ s.c ^ s.d;
}

/* What a real client's RST will carry; `slot` is now >> COOKIE_SLOT_BITS. */
INLINE __u32 cookie(const __u64 *key, const struct plain *packet, __u32 slot)
{
	__u64 words[SIP_WORDS] = {
		packet->source_hi,	packet->source_lo,
		packet->destination_hi, packet->destination_lo,
		(__u64)packet->ports << 32 | slot,
	};

	return (__u32)siphash(key, words);
}

/* Fill `packet` if the frame is plain: 1, else 0. */
INLINE int is_plain(const void *data, const void *end, struct plain *packet)
{
	const struct ethernet_header *ethernet = data;
	const struct tcp_header *tcp;
	const struct ipv6_header *ipv6;
	const struct ipv4_header *ipv4;
	const void *cursor = ethernet + 1;
	__u32 type;

	/* a frame to many is not to be answered */
	if (cursor > end || ethernet->destination[0] & 1)
		return 0;
	type = FROM_BE16(ethernet->type);
	packet->network = sizeof(*ethernet);
	for (__u64 i = 0; i < MAX_VLAN_TAGS; i++) {
		const struct vlan_tag *tag = cursor;

		if (type != ETHERTYPE_VLAN && type != ETHERTYPE_QINQ)
			break;
		if ((const void *)(tag + 1) > end)
			return 0;
		type = FROM_BE16(tag->type);
		cursor = tag + 1;
		packet->network += sizeof(*tag);
	}
	if (type == ETHERTYPE_IPV6) {
		ipv6 = cursor;
		tcp = (const void *)(ipv6 + 1);
		if ((const void *)(tcp + 1) > end || ipv6->next_header != NEXT_TCP ||
		    FROM_BE16(ipv6->payload_length) < sizeof(*tcp))
			return 0;
		packet->ipv4 = 0;
		packet->source_hi = address_half(ipv6->source);
		packet->source_lo = address_half(ipv6->source + 2);
		packet->destination_hi = address_half(ipv6->destination);
		packet->destination_lo = address_half(ipv6->destination + 2);
	} else if (type == ETHERTYPE_IPV4) {
		ipv4 = cursor;
		tcp = (const void *)(ipv4 + 1);
		if ((const void *)(tcp + 1) > end || ipv4->version_length != 0x45 || ipv4->protocol != NEXT_TCP ||
		    FROM_BE16(ipv4->fragment) & 0x3fff || FROM_BE16(ipv4->total_length) < sizeof(*ipv4) + sizeof(*tcp))
			return 0;
		packet->ipv4 = 1;
		packet->source_hi = 0;
		packet->source_lo = FROM_BE32(ipv4->source);
		packet->destination_hi = 0;
		packet->destination_lo = FROM_BE32(ipv4->destination);
	} else {
		return 0;
	}
	packet->ports = (__u32)FROM_BE16(tcp->source) << 16 | FROM_BE16(tcp->destination);
	packet->sequence = FROM_BE32(tcp->sequence);
	packet->flags = tcp->flags;
	return 1;
}

/* Bytes of the answer to a plain frame: no more than the SYN had. */
INLINE __u32 answer_length(const struct plain *packet)
{
	__u32 network = packet->ipv4 ? sizeof(struct ipv4_header) : sizeof(struct ipv6_header);

	return (__u32)packet->network + network + sizeof(struct tcp_header);
}

/* The Internet checksum (RFC 1071) of a sum of 16-bit words. */
INLINE __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)~sum;
}

/* A 64-bit number as the sum of its four 16-bit words. */
INLINE __u64 words_of(__u64 x)
{
	return (x >> 48) + (x >> 32 & 0xffff) + (x >> 16 & 0xffff) + (x & 0xffff);
}

/* Turn a plain SYN frame of answer_length() bytes into its answer, in place. 0 if the frame is too short. */
INLINE int write_answer(void *data, const void *end, const struct plain *packet, __u32 acknowledged)
{
	struct ethernet_header *ethernet = data;
	/* known to be 14, 18 or 22; the verifier has forgotten */
	void *network = data + (packet->network & 31);
	struct tcp_header *tcp;
	__u8 mac[6];
	__u64 sum;

	if ((const void *)(ethernet + 1) > end)
		return 0;
	__builtin_memcpy(mac, ethernet->destination, sizeof(mac));
	__builtin_memcpy(ethernet->destination, ethernet->source, sizeof(mac));
	__builtin_memcpy(ethernet->source, mac, sizeof(mac));
	if (packet->ipv4) {
		struct ipv4_header *ip = network;

		tcp = (void *)(ip + 1);
		if ((const void *)(tcp + 1) > end)
			return 0;
		ip->version_length = 0x45;
		ip->service = 0;
		ip->total_length = FROM_BE16(sizeof(*ip) + sizeof(*tcp));
		ip->id = 0;
		ip->fragment = FROM_BE16(0x4000); /* do not fragment: RFC 6864 lets the id be 0 then */
		ip->ttl = 64;
		ip->protocol = NEXT_TCP;
		ip->source = FROM_BE32((__u32)packet->destination_lo);
		ip->destination = FROM_BE32((__u32)packet->source_lo);
		ip->checksum = FROM_BE16(fold(0x4500 + 40 + 0x4000 + (64 << 8 | NEXT_TCP) +
					      words_of(packet->source_lo) + words_of(packet->destination_lo)));
	} else {
		struct ipv6_header *ip = network;

		tcp = (void *)(ip + 1);
		if ((const void *)(tcp + 1) > end)
			return 0;
		ip->version_flow = FROM_BE32(6u << 28);
		ip->payload_length = FROM_BE16(sizeof(*tcp));
		ip->next_header = NEXT_TCP;
		ip->hop_limit = 64;
		ip->source[0] = FROM_BE32((__u32)(packet->destination_hi >> 32));
		ip->source[1] = FROM_BE32((__u32)packet->destination_hi);
		ip->source[2] = FROM_BE32((__u32)(packet->destination_lo >> 32));
		ip->source[3] = FROM_BE32((__u32)packet->destination_lo);
		ip->destination[0] = FROM_BE32((__u32)(packet->source_hi >> 32));
		ip->destination[1] = FROM_BE32((__u32)packet->source_hi);
		ip->destination[2] = FROM_BE32((__u32)(packet->source_lo >> 32));
		ip->destination[3] = FROM_BE32((__u32)packet->source_lo);
	}
	tcp->source = FROM_BE16((__u16)packet->ports);
	tcp->destination = FROM_BE16((__u16)(packet->ports >> 16));
	tcp->sequence = 0;
	tcp->acknowledgement = FROM_BE32(acknowledged);
	tcp->data_offset = 5 << 4;
	tcp->flags = TCP_SYN | TCP_ACK;
	tcp->window = 0;
	tcp->urgent = 0;
	sum = words_of(packet->source_hi) + words_of(packet->source_lo) + words_of(packet->destination_hi) +
	      words_of(packet->destination_lo) + NEXT_TCP + sizeof(*tcp) + words_of(packet->ports) +
	      words_of(acknowledged) + (5 << 12 | TCP_SYN | TCP_ACK);
	tcp->checksum = FROM_BE16(fold(sum));
	return 1;
}

/* One word of remembered SYNs for a window: whether it has this bit. A word of another window has none. */
INLINE __u64 seen_in(__u64 word, __u64 window, __u64 bit)
{
	return is_zero((word >> SEEN_BITS) ^ (window & 0xffff)) & (word >> bit & 1);
}

/* The word with the bit set. */
INLINE __u64 seen_with(__u64 word, __u64 window, __u64 bit)
{
	__u64 fresh = (window & 0xffff) << SEEN_BITS;

	return choose(is_zero((word >> SEEN_BITS) ^ (window & 0xffff)), word, fresh) | 1ull << bit;
}

#endif
