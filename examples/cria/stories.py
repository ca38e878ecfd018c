"""Short stories from a grammar: a hero, a friend, a place, a plot of several beats, and sometimes a moral.

The plots are in text/stories.txt: "# key | themes", then beats divided by empty lines; one line of a beat is
told ("*"), or perhaps none ("+"). A story knows what it is about, so requests and later questions fit it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache

from examples.cria.wording import TEXT, choose, expand, read_words

_OPENINGS = (
    "Once upon a time there was <akind> named <name>, who lived <home>.",
    "There once was <akind> called <name>. <He> lived <home>.",
    "<Home> lived <akind>. <His> name was <name>.",
    "<name> was <akind> who lived <home>.",
    "Long ago, <home>, there lived <akind> named <name>.",
    "This is the story of <name>, <akind> who lived <home>.",
    "A long time ago there was <akind>, and everyone called <him> <name>. <He> lived <home>.",
)
_TRAITS = (
    "",
    "",
    "<name> liked <food> more than anything.",
    "<name> had a mother, a father, and {many cousins|a big sister|two little brothers}.",
    "Every morning <he> {greeted the sun|looked at the mountains|drank from the cold stream}.",
    "In the evening <he> liked to {look at the stars|listen to old stories|hum a song}.",
    "<He> had {big dark eyes|long lashes|a white spot on the nose|soft ears} and a {good|warm} heart.",
    "<name> had many questions: Why is the sky blue? Where does the wind sleep?",
)
_MORALS = (
    "And so <name> learned that <moral>.",
    "For <moral>.",
    "And the moral is: <moral>.",
    "",
    "",
    "",
    "The end.",
)

_FIRST_ONSETS = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "fl",
    "gr",
    "sh",
)
_ONSETS = (*_FIRST_ONSETS, "kl", "pl", "tr", "zw", "ch", "nn", "ll", "rr", "mb", "nd", "rk")
_WOMEN = {"girl", "princess", "queen", "witch", "fairy"}
_MEN = {"boy", "king", "knight", "wizard"}

REQUESTS = (
    "Tell me a {story|short story|little story|nice story|bedtime story|tale} about <x>.",
    "{Tell|Write} {me |}a {story|short story|tale} about <x>{.|, please.}",
    "{Can|Could} you {tell|write} {me |}a {story|short story|bedtime story} about <x>?",
    "{A|One} {story|short story} about <x>, please{.|!}",
    "I {want|would like} {to hear |}a {story|tale} about <x>.",
    "{Make up|Invent} a {story|tale} about <x>.",
    "Do you know a story about <x>?",
    "story about <x>",
    "{Please tell|Tell} us {something|a story} about <x>.",
    "{Write|Give|Tell} me {a|one|some} {very short|funny|sweet|long|nice|cute} {story|tale} "
    "{about|of|with} <x>.",
    "I {love|like} stories about <x>. {Tell me one|Do you know one|Can you tell me one}{.|?}",
    "{Is there|Have you got|Do you have} a {story|tale} {about|with|of} <x>?",
    "{Now|Then} {tell|write} {me |}{a story|one|a tale} about <x>{.|!}",
    "{And|How about|What about} {one|a story} about <x>?",
    "The story of <x>{, please.|!|.}",
)
PLAIN_REQUESTS = (
    "Tell me a {story|short story|little story|bedtime story|nice story|tale}{.|, please.|!}",
    "{Can|Could} you tell {me |us |}a {story|short story|bedtime story}?",
    "{A|One} story{, please|}{.|!}",
    "I {want|would like} {to hear |}a story.",
    "{Write|Invent|Make up} a {story|short story}.",
    "{Do you know|Have you got} a story{| for me}?",
    "Story{, please|}{.|!|}",
    "Tell me {something nice|a tale}.",
    "I cannot sleep. {Tell me a story|A story, please|Do you have a story for me}{.|?}",
    "{Another|One more} story{, please|}{.|!}",
    "Once upon a time{| there was a llama}{...|}",
    "{Entertain|Surprise} me with a {story|tale}{.|!}",
    "{Can you|Do you} {make up|know any|tell} stories?",
    "Read me {a story|something}{.|, please.}",
)
HELD_OUT_REQUESTS = (
    "Would you be so kind and tell me a story about <x>?",
    "My child wants to hear a story about <x>.",
    "Let me hear a story of <x>.",
)


@dataclass(frozen=True, kw_only=True)
class Story:
    """Hold a story and what it is about."""

    text: str
    about: tuple[str, ...]  # phrases that fill "Tell me a story about ..."
    slots: dict[str, str]
    moral: str


@dataclass(frozen=True, kw_only=True)
class _Plot:
    themes: tuple[str, ...]
    moral: str
    uses_object: bool
    pack_hero: bool
    excludes_fox: bool
    beats: tuple[tuple[str, ...], ...]


@cache
def _plots() -> tuple[_Plot, ...]:
    blocks = re.split(r"^# ", (TEXT / "stories.txt").read_text(), flags=re.MULTILINE)[1:]
    return tuple(_read_plot(block) for block in blocks)


def _read_plot(block: str) -> _Plot:
    head, body = block.split("\n* ", 1)
    first, *options = head.split("\n")
    beats = tuple(tuple(beat.strip().split("\n")) for beat in ("* " + body).split("\n\n") if beat.strip())
    return _Plot(
        themes=tuple(first.split(" | ")[1].split("; ")),
        moral=options[0].removeprefix("moral: "),
        uses_object="uses: object" in options,
        pack_hero="hero: pack" in options,
        excludes_fox="hunter: yes" in options,
        beats=beats,
    )


def a(noun: str) -> str:
    """Put the right article before `noun`."""
    return f"{'an' if noun[0].lower() in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def _pronouns(is_she: bool, prefix: str = "") -> dict[str, str]:
    words = ("she", "her", "her", "herself") if is_she else ("he", "him", "his", "himself")
    names = [f"{prefix}he", f"{prefix}him", f"{prefix}his", f"{prefix}himself"]
    slots = dict(zip(names, words, strict=True))
    return slots | {name.capitalize(): word.capitalize() for name, word in slots.items()}


def make_story(rng: random.Random, *, short: bool = False) -> Story:
    """Tell one story; a short one leaves out what it can."""
    plot = choose(rng, _plots())
    slots, hero = _cast(plot, rng)
    sentences = [expand(choose(rng, _OPENINGS), rng, slots)]
    if not short:
        sentences.append(expand(choose(rng, _TRAITS), rng, slots))
    paragraphs = [" ".join(sentence for sentence in sentences if sentence)]
    body: list[str] = []
    for beat in plot.beats:
        line = choose(rng, beat)
        if line.startswith("+") and (short or rng.random() < 0.3):
            continue
        body.append(expand(line[2:], rng, slots))
    middle = (len(body) + 1) // 2
    if short or rng.random() < 0.3:
        paragraphs = [" ".join([paragraphs[0], *body])]
    else:
        paragraphs += [" ".join(body[:middle]), " ".join(body[middle:])]
    moral = expand(choose(rng, _MORALS), rng, slots | {"moral": plot.moral})
    if moral:
        paragraphs[-1] += " " + moral
    return Story(
        text="\n\n".join(paragraphs), about=_subjects(plot, slots, hero, rng), slots=slots, moral=plot.moral
    )


def _name(is_she: bool, rng: random.Random) -> str:
    """Choose a name, or invent one: invented ones teach the model to keep to the name that it has read."""
    if rng.random() < 0.5:
        return choose(rng, read_words("she" if is_she else "he"))
    return invent_name(
        rng, ("a", "a", "i", "ina", "ella", "ia") if is_she else ("o", "o", "u", "us", "in", "ok")
    )


def invent_name(rng: random.Random, endings: tuple[str, ...] = ("a", "o", "i", "us", "en", "ix")) -> str:
    """Make up a name that is on no list."""
    middle = [choose(rng, _ONSETS) + choose(rng, "aeiou") for _ in range(choose(rng, (0, 0, 1)))]
    first = choose(rng, _FIRST_ONSETS) + choose(rng, "aeiou")
    return (first + "".join(middle) + choose(rng, _ONSETS) + choose(rng, endings)).capitalize()


def _cast(plot: _Plot, rng: random.Random) -> tuple[dict[str, str], str]:
    hero = choose(rng, read_words("pack heroes") if plot.pack_hero else read_words("heroes"))
    while plot.excludes_fox and hero in {"fox", "wolf", "lion", "tiger", "dragon", "bear"}:
        hero = choose(rng, read_words("heroes"))
    is_she = rng.random() < 0.5
    if hero in _WOMEN | _MEN:
        is_she = hero in _WOMEN
    friend_is_she = rng.random() < 0.5
    name = _name(is_she, rng)
    friend = name
    while friend == name:
        friend = _name(friend_is_she, rng)
    friend_kind = hero
    while friend_kind == hero:
        friend_kind = choose(rng, read_words("friends"))
    adjective, home = choose(rng, read_words("adjectives")), choose(rng, read_words("places")).split(" = ")
    thing = f"{choose(rng, read_words('looks'))} {choose(rng, read_words('things'))}"
    kind = f"{adjective} {hero}"
    slots = {
        "name": name,
        "akind": a(kind),
        "kind": hero,
        "adjective": adjective,
        "friend": friend,
        "fkind": friend_kind,
        "fakind": a(friend_kind),
        "home": home[0],
        "Home": home[0][0].upper() + home[0][1:],
        "place": home[1],
        "wild": choose(rng, read_words("wilds")),
        "object": a(thing),
        "theobject": f"the {thing}",
        "thing": thing,
        "food": choose(rng, read_words("treats")),
        "fear": choose(rng, read_words("fears")),
    }
    return slots | _pronouns(is_she) | _pronouns(friend_is_she, "f"), hero


def _subjects(plot: _Plot, slots: dict[str, str], hero: str, rng: random.Random) -> tuple[str, ...]:
    kind, friend = a(hero), slots["fakind"]
    plural = {
        "mouse": "mice",
        "wolf": "wolves",
        "pony": "ponies",
        "deer": "deer",
        "sheep": "sheep",
        "fox": "foxes",
    }
    subjects = [
        kind,
        kind,
        slots["akind"],
        slots["akind"],
        f"{kind} named {slots['name']}",
        f"{kind} called {slots['name']}",
        f"{kind} and {friend}",
        f"{slots['name']} the {hero}",
        plural.get(hero, f"{hero}s"),
        choose(rng, plot.themes),
        choose(rng, plot.themes),
        f"{kind} and {choose(rng, plot.themes)}",
        f"{slots['name']} and {slots['friend']}",
        slots["name"],
    ]
    if plot.uses_object:
        subjects += [slots["object"], f"{kind} and {slots['object']}", f"{kind} with {slots['object']}"]
    if any("<fear>" in line for beat in plot.beats for line in beat):
        subjects += [f"{kind} who is afraid of {slots['fear']}", slots["fear"]]
    return tuple(subjects)


_ASKED = (  # a question about a story, and its answer
    ("What was the name of the <kind>?", "The <kind> was called <name>."),
    ("{What was the <kind>'s name|Who was the story about}?", "The story was about <name>, <akind>."),
    ("Where did <name> live?", "<name> lived <home>."),
    ("{Who was|And who was} <friend>?", "<friend> was <fakind>, and became a friend of <name>."),
    ("Who {helped|was the friend of} <name>?", "It was <friend>, <fakind>."),
    ("What is the moral{| of the story| of this story}?", "The moral is: <moral>."),
    ("What {can|do} we learn from {it|this|the story}?", "We learn that <moral>."),
    ("{What kind of animal|What} was <friend>?", "<friend> was <fakind>."),
    ("{What kind of animal|What} was <name>?", "<name> was <akind>."),
)


def question_about(story: Story, rng: random.Random) -> tuple[str, str]:
    """Ask something that the story has told, with the answer."""
    slots = story.slots | {"moral": story.moral}
    named = [
        pair for pair in _ASKED if "<friend>" not in "".join(pair) or story.slots["friend"] in story.text
    ]
    question, answer = choose(rng, named)
    return expand(question, rng, slots), expand(answer, rng, slots)
