------------------------------- MODULE Epochs -------------------------------
(***************************************************************************)
(* One register of ChunkPaxos while the mesh changes: epochs, eras, the    *)
(* fence, and the oldest open epoch, `base` (CHUNKPAXOS, sections 1, 3, 4, *)
(* 5 and 7).                                                               *)
(*                                                                         *)
(* What is not here, because one epoch is enough to check it: several      *)
(* proposers' timing, crashes, retries.  A ballot stands for the attempt   *)
(* that uses it, whoever runs it; its requests may reach any acceptor at   *)
(* any time, again, or never, and a reply once sent can always be used.    *)
(* An attempt that stops halfway is one whose next step never comes.       *)
(*                                                                         *)
(* A value is named by the ballot that proposed it.  `from[b]` is the      *)
(* ballot whose value b was computed from: the base of b.  So the history  *)
(* of the register is the chain of `from`, and agreement (I5) says that no *)
(* chosen ballot is ever left out of it.                                   *)
(*                                                                         *)
(* The configurations follow each other as `Groups` says; which `base`     *)
(* each of them carries is free, within the rule of section 5.  They are   *)
(* decided in one step: the write-once register that decides them is a     *)
(* single-decree Paxos of its own.                                         *)
(***************************************************************************)
EXTENDS Integers, Sequences, FiniteSets, TLC

CONSTANTS
    a, b, c, d, e,  \* nodes, as model values
    Groups,         \* Groups[i]: the acceptors of the key in epoch i
    Rounds,         \* Rounds[i]: how many full attempts epoch i may see
    KeyEpoch,       \* the epoch that named the key: nothing of it exists before
    Leader,         \* who has the right to the fast create
    WithRead,       \* whether one quorum read happens as well
    Broken          \* "no", or the name of the rule that is left out

Nodes  == UNION {Groups[i] : i \in DOMAIN Groups}
Epochs == DOMAIN Groups

ASSUME Leader \in Groups[KeyEpoch]
ASSUME Broken \in {"no", "BaseTooEarly", "ListedBeforeAdopting", "MergedEras", "NoFence",
                   "FastCreateInLaterEpoch", "BelowKeyEpoch", "ReadForgetsOlderEras", "ReadForgetsEpochs"}

-----------------------------------------------------------------------------
(* Ballots are numbers: 16 * epoch + round.  0 is "nothing", below all.      *)

Ballot(i, r) == 16 * i + r
EpochOf(x)   == x \div 16
IsFast(x)    == x % 16 = 0
ZERO == 0
NONE == -1  \* not proposed, no promise, no reply

FastEpochs == IF Broken = "FastCreateInLaterEpoch" THEN {i \in Epochs : i >= KeyEpoch} ELSE {KeyEpoch}
KeyEpochs  == IF Broken = "BelowKeyEpoch" THEN Epochs ELSE {i \in Epochs : i >= KeyEpoch}
Slow    == {Ballot(i, r) : i \in KeyEpochs, r \in 1..15} \cap UNION {Ballot(i, 1)..Ballot(i, Rounds[i]) : i \in Epochs}
Fast    == {Ballot(i, 0) : i \in FastEpochs}
Ballots == Slow \cup Fast

Max(S) == CHOOSE x \in S : \A y \in S : y <= x
Min(S) == CHOOSE x \in S : \A y \in S : y >= x

IsMajority(S, g) == 2 * Cardinality(S \cap g) > Cardinality(g)

-----------------------------------------------------------------------------
(* Eras of base..epoch, newest first.  A -> B -> A is three of them.         *)

FirstOf(z, i) == Min({j \in z..i : \A k \in j..i : Groups[k] = Groups[i]})

RECURSIVE ErasDown(_, _)
ErasDown(z, i) ==
    LET first == FirstOf(z, i)
        older == IF first = z THEN <<>> ELSE ErasDown(z, first - 1)
    IN  <<[group |-> Groups[i], first |-> first]>> \o older

RECURSIVE MergedDown(_, _, _)
MergedDown(z, i, seen) ==  \* the mistake: each group once, as old as its first use
    IF i < z THEN <<>>
    ELSE IF Groups[i] \in seen THEN MergedDown(z, i - 1, seen)
    ELSE <<[group |-> Groups[i], first |-> Min({j \in z..i : Groups[j] = Groups[i]})]>>
         \o MergedDown(z, i - 1, seen \cup {Groups[i]})

EraTable == [z \in Epochs |-> [i \in Epochs |->
    IF i < z THEN <<>> ELSE IF Broken = "MergedEras" THEN MergedDown(z, i, {}) ELSE ErasDown(z, i)]]

GroupsOf(z, i) == UNION {Groups[k] : k \in z..i}

-----------------------------------------------------------------------------
VARIABLES
    base,      \* of the decided configurations: base[i] is that of epoch i
    epoch,     \* per node: the configuration it has adopted
    promised,  \* per node: its record of the key
    accepted,
    clean,     \* per node: the last epoch at whose adoption it held no value of the key
    promise,   \* per ballot and node: the accepted ballot that its Promise carried
    from,      \* per ballot: the base of what was proposed, or NONE
    voted,     \* per ballot: who ever sent Accepted
    read       \* the quorum read: its epoch (0: not begun), what was chosen before it, the replies

vars == <<base, epoch, promised, accepted, clean, promise, from, voted, read>>

Decided == Len(base)
BaseOf(x) == base[EpochOf(x)]
Nobody == [n \in Nodes |-> NONE]

Chosen(x) == IsMajority(voted[x], Groups[EpochOf(x)])

Init ==
    /\ base = <<1>>
    /\ epoch = [n \in Nodes |-> 1]
    /\ promised = [n \in Nodes |-> ZERO]
    /\ accepted = [n \in Nodes |-> ZERO]
    /\ clean = [n \in Nodes |-> 1]
    /\ promise = [x \in Slow |-> Nobody]
    /\ from = [x \in Ballots |-> NONE]
    /\ voted = [x \in Ballots |-> {}]
    /\ read = [epoch |-> 0, floor |-> ZERO, replies |-> Nobody]

-----------------------------------------------------------------------------
(* Configurations.                                                           *)

(* A majority of the group of z has accepted a ballot of its era, or later.  *)
Settled(z) ==
    LET first == FirstOf(base[Decided], z)
    IN  IsMajority({n \in Groups[z] : EpochOf(accepted[n]) >= first}, Groups[z])

(* n has adopted z, and what it listed after that is settled there.  Without *)
(* a value in its record it has nothing to list.                             *)
Listed(n, z) ==
    IF Broken = "ListedBeforeAdopting"
    THEN accepted[n] = ZERO \/ Settled(z)
    ELSE epoch[n] >= z /\ (clean[n] >= z \/ Settled(z))

Adopted(n, z) == epoch[n] >= z

MayMoveBase(z) ==
    IF Broken = "BaseTooEarly"
    THEN  \* the old groups have adopted z, but only the new one is asked what it knows
        /\ \A i \in base[Decided]..(z - 1) : IsMajority({n \in Groups[i] : Adopted(n, z)}, Groups[i])
        /\ IsMajority({n \in Groups[z] : Listed(n, z)}, Groups[z])
    ELSE
        \A i \in base[Decided]..(z - 1) :
            LET g == Cardinality(Groups[i])
            IN  Cardinality({n \in Groups[i] : Listed(n, z)}) >= g - (g - 1) \div 2

Decide ==
    /\ Decided < Len(Groups)
    /\ \E z \in base[Decided]..Decided :
        /\ z = base[Decided] \/ MayMoveBase(z)
        /\ base' = Append(base, z)
    /\ UNCHANGED <<epoch, promised, accepted, clean, promise, from, voted, read>>

(* Also over several epochs at once: a message of a new one, then the chain. *)
Adopt(n, i) ==
    LET keeps == n \in GroupsOf(base[i], i)
        holds == keeps /\ accepted[n] # ZERO
    IN  /\ epoch[n] < i
        /\ epoch' = [epoch EXCEPT ![n] = i]
        /\ promised' = [promised EXCEPT ![n] = IF keeps THEN @ ELSE ZERO]
        /\ accepted' = [accepted EXCEPT ![n] = IF keeps THEN @ ELSE ZERO]
        /\ clean' = [clean EXCEPT ![n] = IF holds THEN @ ELSE i]
        /\ UNCHANGED <<base, promise, from, voted, read>>

-----------------------------------------------------------------------------
(* Acceptors.                                                                *)

Fence(n, x) ==
    \/ epoch[n] = EpochOf(x)
    \/ Broken = "NoFence" /\ epoch[n] >= EpochOf(x)

(* A Prepare that comes after phase 1 of its attempt has ended is left out: nobody uses the reply,  *)
(* and the record is as if the Promise had come before the end and stayed unused.                   *)
Promise(n, x) ==
    /\ from[x] = NONE
    /\ Fence(n, x)
    /\ n \in GroupsOf(BaseOf(x), EpochOf(x))
    /\ x > promised[n] /\ x > accepted[n]
    /\ promised' = [promised EXCEPT ![n] = x]
    /\ promise' = [promise EXCEPT ![x][n] = accepted[n]]
    /\ UNCHANGED <<base, epoch, accepted, clean, from, voted, read>>

Vote(n, x) ==
    /\ from[x] # NONE
    /\ Fence(n, x)
    /\ n \in Groups[EpochOf(x)]
    /\ IF IsFast(x) THEN promised[n] = ZERO /\ accepted[n] = ZERO
                    ELSE x >= promised[n] /\ x > accepted[n]
    /\ promised' = [promised EXCEPT ![n] = x]
    /\ accepted' = [accepted EXCEPT ![n] = x]
    /\ voted' = [voted EXCEPT ![x] = @ \cup {n}]
    /\ UNCHANGED <<base, epoch, clean, promise, from, read>>

-----------------------------------------------------------------------------
(* Proposers.                                                                *)

(* The promises of S end phase 1: era by era, until one holds a value of its own. *)
RECURSIVE Enough(_, _, _, _)
Enough(x, S, eras, k) ==
    LET here == S \cap eras[k].group
    IN  /\ IsMajority(here, eras[k].group)
        /\ \/ k = Len(eras)
           \/ \E n \in here : EpochOf(promise[x][n]) >= eras[k].first
           \/ Enough(x, S, eras, k + 1)

(* What the attempt may start from: it takes the first promises that are enough, whichever came. *)
Bases(x) ==
    LET eras == EraTable[BaseOf(x)][EpochOf(x)]
        came == {n \in Nodes : promise[x][n] # NONE}
        sets == {S \in SUBSET came : Enough(x, S, eras, 1)}
    IN  {Max({promise[x][n] : n \in S}) : S \in sets}

Propose(x) ==
    /\ from[x] = NONE
    /\ \E z \in Bases(x) : from' = [from EXCEPT ![x] = z]
    /\ promise' = [promise EXCEPT ![x] = Nobody]  \* the attempt looks at no more of them
    /\ UNCHANGED <<base, epoch, promised, accepted, clean, voted, read>>

MayCreate(i) ==
    /\ epoch[Leader] = i
    /\ Leader \in Groups[i]
    /\ promised[Leader] = ZERO /\ accepted[Leader] = ZERO

(* On the own disk first. *)
Create(i) ==
    LET x == Ballot(i, 0)
    IN  /\ MayCreate(i)
        /\ from' = [from EXCEPT ![x] = ZERO]
        /\ promised' = [promised EXCEPT ![Leader] = x]
        /\ accepted' = [accepted EXCEPT ![Leader] = x]
        /\ voted' = [voted EXCEPT ![x] = @ \cup {Leader}]
        /\ UNCHANGED <<base, epoch, clean, promise, read>>

-----------------------------------------------------------------------------
(* One quorum read.  It adopts the key's own epoch first.                    *)

BeginRead(i) ==
    /\ WithRead
    /\ read.epoch = 0
    /\ i >= KeyEpoch
    /\ read' = [read EXCEPT !.epoch = i, !.floor = Max({x \in Ballots : Chosen(x)} \cup {ZERO})]
    /\ UNCHANGED <<base, epoch, promised, accepted, clean, promise, from, voted>>

ReadReply(n) ==
    /\ read.epoch # 0
    /\ n \in Groups[read.epoch]
    /\ epoch[n] = read.epoch \/ Broken = "ReadForgetsEpochs"
    /\ read.replies[n] = NONE
    /\ read' = [read EXCEPT !.replies[n] = accepted[n]]
    /\ UNCHANGED <<base, epoch, promised, accepted, clean, promise, from, voted>>

Answers ==  \* the ballots a reader would answer with
    LET i == read.epoch
        eras == EraTable[base[i]][i]
    IN  IF i = 0 THEN {}
        ELSE {x \in Ballots \cup {ZERO} :
                /\ IsMajority({n \in Nodes : read.replies[n] = x}, Groups[i])
                /\ \/ Len(eras) = 1
                   \/ EpochOf(x) >= eras[1].first
                   \/ Broken = "ReadForgetsOlderEras"}

-----------------------------------------------------------------------------
Next ==
    \/ Decide
    \/ \E n \in Nodes, i \in 2..Decided : Adopt(n, i)
    \/ \E x \in Slow : EpochOf(x) <= Decided /\ (Propose(x) \/ \E n \in Nodes : Promise(n, x))
    \/ \E x \in Ballots : EpochOf(x) <= Decided /\ \E n \in Nodes : Vote(n, x)
    \/ \E i \in FastEpochs : Create(i)
    \/ \E i \in 1..Decided : BeginRead(i)
    \/ \E n \in Nodes : ReadReply(n)

Spec == Init /\ [][Next]_vars

-----------------------------------------------------------------------------
(* Invariants, named as in section 7.                                        *)

TypeOK ==
    /\ Decided \in Epochs /\ \A i \in 1..Decided : base[i] \in 1..i
    /\ epoch \in [Nodes -> 1..Decided]
    /\ promised \in [Nodes -> Ballots \cup {ZERO}]
    /\ accepted \in [Nodes -> Ballots \cup {ZERO}]
    /\ clean \in [Nodes -> 1..Decided]
    /\ promise \in [Slow -> [Nodes -> Ballots \cup {ZERO, NONE}]]
    /\ from \in [Ballots -> Ballots \cup {ZERO, NONE}]
    /\ voted \in [Ballots -> SUBSET Nodes]

(* promised, accepted and epoch never go down; only an adoption drops a record *)
I1 == [][\A n \in Nodes :
            /\ epoch'[n] >= epoch[n]
            /\ epoch'[n] = epoch[n] => promised'[n] >= promised[n] /\ accepted'[n] >= accepted[n]]_vars

I2 == \A n \in Nodes : accepted[n] <= promised[n]

(* What was proposed at a ballot stays; round 0 is not spent twice. *)
I3 == /\ \A i \in FastEpochs : from[Ballot(i, 0)] # NONE => ~MayCreate(i)
I3Stays == [][\A x \in Ballots : from[x] # NONE => from'[x] = from[x]]_vars

(* Behind a non-fresh proposal, a majority of each group that was open refuses all older ballots, *)
(* down to the era whose value the proposal starts from.                                          *)
I4 == \A x \in Slow :
        from[x] # NONE =>
            LET eras == EraTable[BaseOf(x)][EpochOf(x)]
            IN  \A k \in DOMAIN eras :
                    \/ \E j \in 1..(k - 1) : EpochOf(from[x]) >= eras[j].first
                    \/ IsMajority({n \in Nodes : promised[n] >= x \/ epoch[n] > EpochOf(x)}, eras[k].group)

(* Agreement: the base of a later proposal is at least what is chosen. *)
I5 == \A x \in Ballots : Chosen(x) => \A y \in Ballots : y > x /\ from[y] # NONE => from[y] >= x

(* The same, seen from the values: each chosen one is an ancestor of each later one. *)
RECURSIVE Ancestors(_)
Ancestors(x) == IF x = ZERO THEN {} ELSE {from[x]} \cup Ancestors(from[x])
Chain == \A x, y \in Ballots : x < y /\ Chosen(x) /\ Chosen(y) => x \in Ancestors(y)

(* What a quorum read answers is chosen (or absent), and no older than what was chosen before it began. *)
I6 == \A x \in Answers : x >= read.floor /\ (x = ZERO \/ Chosen(x))

I7 == \A n \in Nodes : promised[n] # ZERO => n \in GroupsOf(base[epoch[n]], epoch[n])

(* Round 0 only in the key's own epoch, on its leader's disk first, on absent records; nothing below that epoch. *)
I8 == \A x \in Ballots :
        /\ voted[x] # {} => EpochOf(x) >= KeyEpoch
        /\ IsFast(x) /\ voted[x] # {} => EpochOf(x) = KeyEpoch /\ Leader \in voted[x]
I8Absent == [][\A x \in Fast : \A n \in voted'[x] \ voted[x] : promised[n] = ZERO /\ accepted[n] = ZERO]_vars

(* Not an invariant: TLC must find what it denies, or the rest holds for want of anything happening. *)
(* A value was chosen in the first group, base moved past that group, a holder dropped its record,   *)
(* and the newest epoch has chosen a successor of the value.                                         *)
NothingMoves ==
    ~ \E x, y \in Ballots :
        /\ EpochOf(x) = 1 /\ Chosen(x)
        /\ EpochOf(y) = Len(Groups) /\ Chosen(y) /\ from[y] >= x
        /\ Decided = Len(Groups) /\ base[Decided] > 1
        /\ \E n \in voted[x] : promised[n] = ZERO

-----------------------------------------------------------------------------
(* Scenarios, named by the configuration files.                              *)

Swap    == <<{a, b, c}, {b, c, d}>>
Replace == <<{a, b, c}, {b, c, d}, {b, c, d}>>
Return  == <<{a, b, c}, {b, c, d}, {a, b, c}>>
Slide   == <<{a, b, c}, {b, c, d}, {c, d, e}>>
Shrink  == <<{a, b, c}, {a, b}, {a}>>
Grow    == <<{a}, {a, b}, {a, b, c}>>
GoBack  == <<{a, b, c}, {b, c, d}, {b, c, d}, {a, b, c}>>

Once2   == <<1, 1>>
Once3   == <<1, 1, 1>>
Twice2  == <<2, 2>>
Late3   == <<0, 1, 1>>
EndOnly == <<0, 1, 0, 1>>

Alike == Permutations({b, c})  \* where a leads and both groups hold b and c
=============================================================================
