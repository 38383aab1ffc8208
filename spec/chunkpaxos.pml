/*
 * One register of ChunkPaxos (CHUNKPAXOS, sections 3, 4 and 7) within one epoch, for exhaustive search
 * by Spin: scripts/check-model.
 *
 * Who takes part
 *   ACCEPTORS   nodes 0, 1, 2 (the key's group), or five. Node 0 is the key's implicit leader. Records
 *               are durable: a step is one group commit, so a crash of an acceptor changes nothing.
 *   ballots     ZERO; then two at round 0; then BALLOTS at later rounds, in their order:
 *                 CREATE_1, CREATE_2   the fast creates of the leader's first boot and of its second,
 *                                      after a crash: another ballot, as the boot is part of it
 *                 3 .. LAST            each used by one proposer, once. Who that is does not matter:
 *                                      all of them may be under way at once, and each may stop at any
 *                                      point and for ever, which is a crash
 *   a reader    of one quorum read at a time
 *
 * What they say to each other is a set that only grows. A message in it may be taken at any time, any
 * number of times, or never: loss, duplication, delay, reordering. Prepare(b) is in it from the start:
 * it holds nothing that a proposer would have to know before. Nacks are left out: they only make a
 * proposer stop, and any proposer may stop.
 *
 * A value is named by its ballot, as the compare-and-swap makes the value of b out of that of base[b],
 * the highest accepted ballot among the promises. A value contains an earlier one if following `base`
 * from it leads there.
 *
 * Asserted, as what users see
 *   agreement        of two chosen values, that of the higher ballot contains the other: no acknowledged
 *                    write is lost, and nothing is chosen below what was chosen before it began, as a
 *                    value cannot contain what began after it
 *   read_is_chosen   a quorum read answers with a chosen value, or with none
 *   read_is_recent   and not with an older one than was chosen when it began
 * and, unless -DOUTCOMES_ONLY, as what keeps it so
 *   I1  promised and accepted never go down          I2  accepted <= promised
 *   I3  one value per ballot                         I5  if x is chosen, no later ballot has a base below x
 *   I8  a fresh accept only on an absent record
 *
 * Must be possible, so -DSEEK_NAME, which asserts the opposite, must fail:
 *   SEEK_ALL                  the first create and then every round is chosen
 *   SEEK_SECOND_BOOT          the create of the leader's second boot is chosen
 *
 * Wrong variants, each one rule away, by -DNAME; each must fail:
 *   ANY_OWNER_ROUND_ZERO      a second node may create at round 0 too
 *   NO_OWN_DISK_FIRST         the leader sends its create without a vote of its own disk
 *   FRESH_OVER_PROMISE        a fresh accept looks at accepted only
 *   PREPARE_IGNORES_ACCEPTED  an accept leaves the promise, and a prepare looks at the promise only
 *   ACCEPT_IGNORES_PROMISE    an accept looks at accepted only
 *   PROMISES_IN_MEMORY        a crash of an acceptor forgets its promise
 *   ANY_PROMISED_VALUE        a proposer takes any of the promised values, not that of the highest ballot
 *   MINORITY_PROMISES         one promise less than a majority is enough
 *   MINORITY_VOTES            one vote less than a majority is enough
 *   READ_TAKES_HIGHEST        a reader takes the highest of a mixed quorum
 *   BALLOT_TWICE              a proposer, or its next run, proposes again at a ballot it has used. Breaks
 *                             I3, on which the names of values rest: outcomes show nothing beyond it
 */

#ifndef BALLOTS
#define BALLOTS 3
#endif
#ifndef ACCEPTORS
#define ACCEPTORS 3
#endif

#define ZERO 0
#define CREATE_1 1
#define CREATE_2 2
#define LAST (BALLOTS + 2)
#define UNSENT 255

#define MAJORITY (ACCEPTORS / 2 + 1)
#define LEADER 0
#ifdef ANY_OWNER_ROUND_ZERO
#define SECOND_CREATOR 1
#else
#define SECOND_CREATOR LEADER
#endif

/* Records. Both ZERO: absent. */
byte promised[ACCEPTORS];
byte accepted[ACCEPTORS];

/* Messages. What no step will look at any more is forgotten: it would only multiply the states. */
byte promises[(LAST + 1) * ACCEPTORS];   /* Promise(b, x) of a: bit x of PROMISE(b, a), until b is proposed */
byte base[LAST + 1] = UNSENT;            /* Accept(b, the value made of base[b]), if not UNSENT */
byte votes[LAST + 1];                    /* Accepted(b) of a: bit a of votes[b], until b is CHOSEN */

/* The reader. It begins when its first reply is made: an earlier beginning would ask less of it. */
byte read_ballot;                        /* what the replies so far agree on */
byte read_from;                          /* bit a: acceptor a has replied */
byte chosen_before;                      /* the highest ballot that was chosen when the read began */

/* Scratch of single steps, and the names of what is asserted; no part of the state. */
hidden byte x, y, z;
hidden byte agreement, read_is_chosen, read_is_recent, I1, I2, I3, I5, I8, not_seen;

#define PROMISE(b, a) promises[(b) * ACCEPTORS + (a)]
#define BIT(bits, n) (((bits) >> (n)) & 1)
#define ONES(bits) (BIT(bits, 0) + BIT(bits, 1) + BIT(bits, 2) + BIT(bits, 3) + BIT(bits, 4))
#define CHOSEN 31
#define IS_CHOSEN(b) (votes[b] == CHOSEN)
#define ABSENT(a) (promised[a] == ZERO && accepted[a] == ZERO)

#ifdef OUTCOMES_ONLY
#define INVARIANT(name, condition) skip
#else
#define INVARIANT(name, condition) name = (condition); assert(name)
#endif

/* Acceptors that have promised b with an accepted ballot of at most v. */
#define PROMISED_UP_TO(b, v, a) ((PROMISE(b, a) & ((2 << (v)) - 1)) != 0)
#if ACCEPTORS == 3
#define PROMISERS(b, v) (PROMISED_UP_TO(b, v, 0) + PROMISED_UP_TO(b, v, 1) + PROMISED_UP_TO(b, v, 2))
#define PROMISED_EXACTLY(b, v) (BIT(PROMISE(b, 0) | PROMISE(b, 1) | PROMISE(b, 2), v) == 1)
#elif ACCEPTORS == 5
#define PROMISERS(b, v) (PROMISED_UP_TO(b, v, 0) + PROMISED_UP_TO(b, v, 1) + PROMISED_UP_TO(b, v, 2) \
    + PROMISED_UP_TO(b, v, 3) + PROMISED_UP_TO(b, v, 4))
#define PROMISED_EXACTLY(b, v) \
    (BIT(PROMISE(b, 0) | PROMISE(b, 1) | PROMISE(b, 2) | PROMISE(b, 3) | PROMISE(b, 4), v) == 1)
#else
#error "ACCEPTORS is 3 or 5"
#endif

/* A majority of promises whose highest accepted ballot is v. More of them than a majority add no
   case: the highest one is also the highest of some majority that holds it. */
#if defined(ANY_PROMISED_VALUE)
#define SETTLES(b, v) (PROMISED_EXACTLY(b, v) && PROMISERS(b, LAST) >= MAJORITY)
#elif defined(MINORITY_PROMISES)
#define SETTLES(b, v) (PROMISED_EXACTLY(b, v) && PROMISERS(b, v) >= MAJORITY - 1)
#else
#define SETTLES(b, v) (PROMISED_EXACTLY(b, v) && PROMISERS(b, v) >= MAJORITY)
#endif

#ifdef MINORITY_VOTES
#define VOTES_NEEDED (MAJORITY - 1)
#else
#define VOTES_NEEDED MAJORITY
#endif

#ifdef BALLOT_TWICE
#define MAY_PROPOSE(b) true
#define FORGET_PROMISES(b) skip
#else
#define MAY_PROPOSE(b) (base[b] == UNSENT)
#define FORGET_PROMISES(b) for (x : 0 .. ACCEPTORS - 1) { PROMISE(b, x) = 0 }
#endif

#ifdef PREPARE_IGNORES_ACCEPTED
#define PREPARE_FLOOR(a) promised[a]
#define PROMISE_OF_ACCEPT(a, b) promised[a]
#else
#define PREPARE_FLOOR(a) (promised[a] > accepted[a] -> promised[a] : accepted[a])
#define PROMISE_OF_ACCEPT(a, b) b
#endif

#ifdef ACCEPT_IGNORES_PROMISE
#define ACCEPT_FLOOR(a) accepted[a]
#else
#define ACCEPT_FLOOR(a) PREPARE_FLOOR(a)
#endif

#ifdef FRESH_OVER_PROMISE
#define MAY_ACCEPT_FRESH(a, b) (accepted[a] == ZERO)
#else
#define MAY_ACCEPT_FRESH(a, b) ABSENT(a)
#endif

#if defined(SEEK_ALL)
#if BALLOTS == 1
#define ROUNDS_CHOSEN IS_CHOSEN(3)
#elif BALLOTS == 2
#define ROUNDS_CHOSEN IS_CHOSEN(3) && IS_CHOSEN(4)
#elif BALLOTS == 3
#define ROUNDS_CHOSEN IS_CHOSEN(3) && IS_CHOSEN(4) && IS_CHOSEN(5)
#else
#define ROUNDS_CHOSEN IS_CHOSEN(3) && IS_CHOSEN(4) && IS_CHOSEN(5) && IS_CHOSEN(6)
#endif
#define SEEK not_seen = !(IS_CHOSEN(CREATE_1) && ROUNDS_CHOSEN); assert(not_seen)
#elif defined(SEEK_SECOND_BOOT)
#define SEEK not_seen = !IS_CHOSEN(CREATE_2); assert(not_seen)
#else
#define SEEK skip
#endif

/* After each proposal and each vote. */
inline check() {
    for (x : 1 .. LAST - 1) {
        if
        :: IS_CHOSEN(x) ->
            for (y : x + 1 .. LAST) {
                INVARIANT(I5, base[y] == UNSENT || base[y] >= x);
                if
                :: IS_CHOSEN(y) ->
                    z = y;
                    do
                    :: z > x -> z = base[z]
                    :: else -> break
                    od;
                    agreement = (z == x);
                    assert(agreement)
                :: else
                fi
            }
        :: else
        fi
    }
    SEEK   /* something, at least: a d_step must not end with the way out of a loop */
}

inline write(a, new_promised, new_accepted) {
    INVARIANT(I1, new_promised >= promised[a] && new_accepted >= accepted[a]);
    promised[a] = new_promised;
    accepted[a] = new_accepted;
    INVARIANT(I2, accepted[a] <= promised[a])
}

/* The value of b is made of that of v, and Accept(b) goes out. */
inline propose(b, v) {
    printf("ballot %d: proposed upon %d\n", b, v);
    INVARIANT(I3, base[b] == UNSENT || base[b] == v);
    base[b] = v;
    FORGET_PROMISES(b);
    check()
}

inline vote(a, b, new_promised) {
    printf("ballot %d: vote of node %d\n", b, a);
    write(a, new_promised, b);
    votes[b] = (ONES(votes[b] | 1 << a) >= VOTES_NEEDED -> CHOSEN : votes[b] | 1 << a);
    check()
}

/* prepare(b) is refused at or below the floor. Above it, and again for a duplicate, it is promised. */
#define ON_PREPARE(a, b) \
    :: d_step { \
        b > PREPARE_FLOOR(a) -> \
            printf("ballot %d: promise of node %d, which has accepted %d\n", b, a, accepted[a]); \
            write(a, b, accepted[a]); \
            PROMISE(b, a) = (MAY_PROPOSE(b) -> PROMISE(b, a) | 1 << accepted[a] : 0) \
    } \
    :: d_step { \
        MAY_PROPOSE(b) && b == promised[a] && b > accepted[a] && !BIT(PROMISE(b, a), accepted[a]) -> \
            printf("ballot %d: another promise of node %d, which has accepted %d\n", b, a, accepted[a]); \
            PROMISE(b, a) = PROMISE(b, a) | 1 << accepted[a] \
    }

/* accept(b): a vote for b that is there already stays as it is (a retransmission). */
#define ON_ACCEPT(a, b) \
    :: d_step { \
        base[b] != UNSENT && b != accepted[a] && b >= ACCEPT_FLOOR(a) -> \
            vote(a, b, PROMISE_OF_ACCEPT(a, b)) \
    }

#define ON_ACCEPT_FRESH(a, b) \
    :: d_step { \
        base[b] != UNSENT && b != accepted[a] && MAY_ACCEPT_FRESH(a, b) -> \
            INVARIANT(I8, ABSENT(a)); \
            vote(a, b, PROMISE_OF_ACCEPT(a, b)) \
    }

#define ON_READ(a) \
    :: d_step { \
        read_from == 0 -> \
            printf("read: begins, node %d has accepted %d\n", a, accepted[a]); \
            chosen_before = ZERO; \
            for (x : 1 .. LAST) { \
                if \
                :: IS_CHOSEN(x) -> chosen_before = x \
                :: else \
                fi \
            } \
            read_ballot = accepted[a]; \
            read_from = 1 << a \
    } \
    :: d_step { \
        read_from != 0 && !BIT(read_from, a) && COUNTS(a) -> \
            printf("read: node %d has accepted %d\n", a, accepted[a]); \
            read_ballot = (accepted[a] > read_ballot -> accepted[a] : read_ballot); \
            read_from = read_from | 1 << a; \
            if \
            :: ONES(read_from) >= MAJORITY -> \
                read_is_chosen = (read_ballot == ZERO || IS_CHOSEN(read_ballot)); \
                assert(read_is_chosen); \
                read_is_recent = (read_ballot >= chosen_before); \
                assert(read_is_recent); \
                read_ballot = ZERO; \
                read_from = 0; \
                chosen_before = ZERO \
            :: else \
            fi; \
            skip \
    }
#ifdef READ_TAKES_HIGHEST
#define COUNTS(a) true
#else
#define COUNTS(a) (accepted[a] == read_ballot)
#endif

/* The leader looks at its own record, votes on its own disk, and only then sends. What a crash
   between the two leaves is a message that is never taken. */
#ifdef NO_OWN_DISK_FIRST
#define FAST_CREATE(b, owner) \
    :: d_step { ABSENT(owner) -> INVARIANT(I3, base[b] == UNSENT); propose(b, ZERO) }
#else
#define FAST_CREATE(b, owner) \
    :: d_step { ABSENT(owner) -> INVARIANT(I3, base[b] == UNSENT); propose(b, ZERO); vote(owner, b, b) }
#endif

#define PROPOSE(b, v) \
    :: d_step { v < b && MAY_PROPOSE(b) && SETTLES(b, v) -> propose(b, v) }

#if BALLOTS == 1
#define EACH_ROUND(does, a) does(a, 3)
#elif BALLOTS == 2
#define EACH_ROUND(does, a) does(a, 3) does(a, 4)
#elif BALLOTS == 3
#define EACH_ROUND(does, a) does(a, 3) does(a, 4) does(a, 5)
#elif BALLOTS == 4
#define EACH_ROUND(does, a) does(a, 3) does(a, 4) does(a, 5) does(a, 6)
#else
#error "BALLOTS is 1 to 4"
#endif

#if ACCEPTORS == 3
#define EACH_ACCEPTOR(does) does(0) does(1) does(2)
#else
#define EACH_ACCEPTOR(does) does(0) does(1) does(2) does(3) does(4)
#endif

#ifdef PROMISES_IN_MEMORY
#define ON_CRASH(a) \
    :: d_step { \
        promised[a] > accepted[a] -> \
            printf("crash of node %d\n", a); \
            write(a, accepted[a], accepted[a]) \
    }
#else
#define ON_CRASH(a)
#endif

#define ACCEPTOR(a) \
    EACH_ROUND(ON_PREPARE, a) \
    EACH_ROUND(ON_ACCEPT, a) \
    ON_ACCEPT_FRESH(a, CREATE_1) \
    ON_ACCEPT_FRESH(a, CREATE_2) \
    ON_READ(a) \
    ON_CRASH(a)

#define PROPOSER(b) PROPOSE(b, ZERO) PROPOSE(b, CREATE_1) PROPOSE(b, CREATE_2) EACH_ROUND(PROPOSE, b)

/* One process: who takes the next step is one choice, and a state is no more than the words above. */
active proctype Mesh() {
end:
    do
    FAST_CREATE(CREATE_1, LEADER)
    FAST_CREATE(CREATE_2, SECOND_CREATOR)
    EACH_ACCEPTOR(ACCEPTOR)
    PROPOSER(3)
#if BALLOTS >= 2
    PROPOSER(4)
#endif
#if BALLOTS >= 3
    PROPOSER(5)
#endif
#if BALLOTS >= 4
    PROPOSER(6)
#endif
    od
}
