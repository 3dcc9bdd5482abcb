"""Plain English sentences without end and without meaning, and words to name things by, from a seeded source."""

from __future__ import annotations

import random
from collections.abc import Iterator

ADJECTIVES = (
    "amber ancient azure bitter blue bold brave brief bright brisk broad bronze busy calm careful cheap clean clear "
    "clever cold common cool copper coral crisp curious damp dark deep dim distant double dry dull dusty eager early "
    "easy empty even fair faint famous fast fierce final fine firm flat fond foreign formal frail free fresh frozen "
    "full gentle giant glad golden good grand gray great green happy hard harsh hasty heavy hidden high hollow honest "
    "huge humble hungry icy idle inner iron ivory jolly keen kind large late lazy lean light little lively local lone "
    "long loose lost loud loyal lucky marble merry mild modern modest narrow near neat new nimble noble noisy normal "
    "odd old open orange outer pale patient plain pleasant polite poor proper proud pure purple quick quiet rapid rare "
    "raw ready red rich ripe rough round royal rural rusty sad safe salty scarlet secret sharp short shy silent silver "
    "simple slim slow small smart smooth soft solid sour spare square steady steep stiff stony strange strict strong "
    "subtle sudden sunny sweet swift tall tame tender thick thin tidy tiny tired tough true upper urban useful vast "
    "violet vivid warm wary weak wealthy wet white whole wide wild wise wooden yellow young"
).split()

NOUNS = (
    "acorn anchor apple arrow badger bag ball banana barn barrel basin basket bead beam bean bear bell bench berry "
    "bird blanket boat bolt book boot bottle bowl box branch bread brick bridge broom bucket button cabin cake camel "
    "candle canoe carpet carrot cart castle chain chair cheese cherry chest circle clock cloud coat coin comb corn "
    "cotton crab cradle crane crown cup curtain deer desk dish dog dolphin door dove dragon drum duck eagle engine "
    "falcon fan feather fence fern ferry field finger flag flower flute forest fork fountain fox frog garden gate "
    "glass glove goat goose grape guitar hammer harbor hat hawk hedge helmet heron hill hook horn horse island ivy "
    "jacket jar jewel kettle key kite kitten knife ladder lake lamp lantern leaf lemon letter lily lion lock magnet "
    "maple mask meadow melon mill mirror mole monkey moon moss mouse needle nest net oak oar olive onion orchard otter "
    "owl oyster paddle palace panda paper parrot peach peanut pear pearl pebble pen pepper piano pigeon pillow pine "
    "pipe plate plum pocket pond pony poppy potato pumpkin puzzle quilt rabbit raft rail rake raven ribbon ring river "
    "robin rocket roof rope rose saddle sail salmon scarf shelf shell ship shoe shovel sled snail spade sparrow spider "
    "spoon squirrel stone stove swan table tent tiger torch tower train tree trumpet tulip tunnel turtle vase violin "
    "wagon walnut wheel whistle willow window wolf yarn zebra"
).split()

_PEOPLE = (
    "baker captain carpenter clerk doctor farmer gardener guide judge merchant miller neighbor nurse painter pilot "
    "poet potter sailor shepherd singer smith student tailor teacher traveler waiter weaver widow writer"
).split()
_VERBS = "carried counted described found forgot liked moved noticed painted remembered repaired sold wanted".split()
_PLACES = (
    "at the market, behind the church, beside the canal, by the old mill, in the next valley, near the station, "
    "on the far shore, outside the town, under the bridge, at the end of the road"
).split(", ")
_TIMES = (
    "before dawn, in the evening, after the rain, last winter, on the first day of spring, during the long drought, "
    "while the others slept, for the second time, as usual, without a word"
).split(", ")


MOST_NAMES = len(ADJECTIVES) * len(NOUNS)


def names(source: random.Random, count: int) -> list[str]:
    """Distinct names of two words, ``adjective-noun``, in random order.

    Parameters
    ----------
    source : random.Random
    count : int
        At most `MOST_NAMES`.
    """
    chosen = source.sample(range(MOST_NAMES), count)
    return [f"{ADJECTIVES[i % len(ADJECTIVES)]}-{NOUNS[i // len(ADJECTIVES)]}" for i in chosen]


def sentences(source: random.Random) -> Iterator[str]:
    """Sentences without end; each ends with a full stop and holds no digit."""
    while True:
        person, verb, adjective, noun = map(source.choice, (_PEOPLE, _VERBS, ADJECTIVES, NOUNS))
        yield f"The {person} {verb} the {adjective} {noun} {source.choice(_PLACES)} {source.choice(_TIMES)}."
