// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// What happens at a connect(2) within the cgroup (B1, B2): if it is to a listener of a proxy, and an instance in the
// list of that listener's service listens at that moment, it goes to the instance. Every other connect stays as it is.
//
// `make bypass` compiles it to connect4.bin and connect6.bin, bare instructions. Where they name a map, they have one of
// the numbers of MAP below, which the loader (kernel.py) replaces by the map.

#include <linux/bpf.h>
#include <linux/in.h>

// Instances that one list has at most; kernel.py has the same number.
#define SLOTS 16

#define TCP_LISTEN 10

// 0000:0000:0000:ffff: how an IPv4 address begins as an IPv6 one (RFC 4291, 2.5.5.2); in the order of the network, as
// is every address and port here.
#define MAPPED __builtin_bswap32(0xffff)

// Of a listener. The cookie is that of its network namespace: 127.0.0.1 of another one is another address.
struct key {
	__u64 netns;
	__u32 address[4];
	__u32 port;
	__u32 zero;
};

struct slot {
	__u32 address[4];
	__u32 port;
	// Which counter has the connects that went to it.
	__u32 counter;
};

// The kernel replaces an entry whole, but may give the memory of the one before to another entry at once, while
// somebody still reads it. So each list that is written has a number of its own at both ends: who finds another one
// there after it has read what it needs has read a mixture.
struct list {
	__u64 first;
	__u32 length;
	// Which counter says whose turn it is.
	__u32 turn;
	// Which counter has the connects that found nobody listening.
	__u32 missed;
	__u32 zero;
	struct slot slots[SLOTS];
	__u64 last;
};

#define MAP(number) ({ void *map; asm volatile("%0 = 0x6d6c6d0" #number " ll" : "=r"(map)); map; })
#define LISTS MAP(1)
#define COUNTERS MAP(2)

static void *(*const lookup)(void *, const void *) = (void *)BPF_FUNC_map_lookup_elem;
static struct bpf_sock *(*const lookup_tcp)(void *, struct bpf_sock_tuple *, __u32, __u64, __u64) =
	(void *)BPF_FUNC_skc_lookup_tcp;
static long (*const release)(void *) = (void *)BPF_FUNC_sk_release;
static __u64 (*const netns_cookie)(void *) = (void *)BPF_FUNC_get_netns_cookie;

#define INLINE static inline __attribute__((always_inline))

INLINE void count(__u32 number)
{
	__u64 *counter = lookup(COUNTERS, &number);

	if (counter)
		__sync_fetch_and_add(counter, 1);
}

INLINE int listens(void *ctx, const struct slot *slot)
{
	struct bpf_sock_tuple to = {};
	__u32 size, state;
	struct bpf_sock *found;

	if (!slot->address[0] && !slot->address[1] && slot->address[2] == MAPPED) {
		to.ipv4.daddr = slot->address[3];
		to.ipv4.dport = slot->port;
		size = sizeof(to.ipv4);
	} else {
		__builtin_memcpy(to.ipv6.daddr, slot->address, sizeof(to.ipv6.daddr));
		to.ipv6.dport = slot->port;
		size = sizeof(to.ipv6);
	}
	found = lookup_tcp(ctx, &to, size, BPF_F_CURRENT_NETNS, 0);
	if (!found)
		return 0;
	state = found->state;
	release(found);
	return state == TCP_LISTEN;
}

// Where a connect to a listener goes, into `chosen`; 0: nowhere else.
INLINE int choose(struct bpf_sock_addr *ctx, const struct key *key, struct slot *chosen)
{
	const volatile struct list *list;
	__u32 length, start, tried, number, missed;
	__u64 *turn, version;

	// A socket that is bound to a device, or to a VRF, means another network's address.
	if (ctx->sk && ctx->sk->bound_dev_if)
		return 0;
	list = lookup(LISTS, key);
	if (!list)
		return 0;
	version = list->first;
	length = list->length;
	number = list->turn;
	missed = list->missed;
	if (length == 0 || length > SLOTS || list->first != version || list->last != version)
		return 0;
	turn = lookup(COUNTERS, &number);
	if (!turn)
		return 0;
	start = __sync_fetch_and_add(turn, 1);
	for (tried = 0; tried < SLOTS && tried < length; tried++) {
		__u64 at = (start + tried) % length;
		const volatile struct slot *slot;

		// The compiler knows that it is within bounds; the verifier wants to see it. Where the loader has no
		// CAP_PERFMON, it must never be a constant to it either, which is why `start` comes from a map.
		asm volatile("%0 &= %1" : "+r"(at) : "i"(SLOTS - 1));
		slot = &list->slots[at];
		chosen->address[0] = slot->address[0];
		chosen->address[1] = slot->address[1];
		chosen->address[2] = slot->address[2];
		chosen->address[3] = slot->address[3];
		chosen->port = slot->port;
		chosen->counter = slot->counter;
		if (list->first != version || list->last != version)
			return 0;
		if (listens(ctx, chosen)) {
			count(chosen->counter);
			// Who does not listen has no turn: else its successor would have two.
			if (tried)
				__sync_fetch_and_add(turn, tried);
			return 1;
		}
	}
	count(missed);
	return 0;
}

__attribute__((section("cgroup/connect4"), used)) int connect4(struct bpf_sock_addr *ctx)
{
	struct key key = {};
	struct slot chosen = {};

	if (ctx->protocol != IPPROTO_TCP)
		return 1;
	key.netns = netns_cookie(ctx);
	key.address[2] = MAPPED;
	key.address[3] = ctx->user_ip4;
	key.port = ctx->user_port;
	// An IPv4 socket reaches no IPv6 address; the lists of IPv4 listeners have none.
	if (choose(ctx, &key, &chosen) && chosen.address[2] == MAPPED) {
		ctx->user_ip4 = chosen.address[3];
		ctx->user_port = chosen.port;
	}
	return 1;
}

__attribute__((section("cgroup/connect6"), used)) int connect6(struct bpf_sock_addr *ctx)
{
	struct key key = {};
	struct slot chosen = {};

	if (ctx->protocol != IPPROTO_TCP)
		return 1;
	key.netns = netns_cookie(ctx);
	key.address[0] = ctx->user_ip6[0];
	key.address[1] = ctx->user_ip6[1];
	key.address[2] = ctx->user_ip6[2];
	key.address[3] = ctx->user_ip6[3];
	key.port = ctx->user_port;
	if (choose(ctx, &key, &chosen)) {
		ctx->user_ip6[0] = chosen.address[0];
		ctx->user_ip6[1] = chosen.address[1];
		ctx->user_ip6[2] = chosen.address[2];
		ctx->user_ip6[3] = chosen.address[3];
		ctx->user_port = chosen.port;
	}
	return 1;
}
