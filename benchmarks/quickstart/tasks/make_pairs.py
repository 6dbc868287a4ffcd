"""Write `pairs.jsonl`: minimal pairs of English sentences, from the words and frames below.

    python benchmarks/quickstart/tasks/make_pairs.py

Items come as twins: two frames, each with the word that is right in it, and each wrong with the other's. So in every
phenomenon a word is right exactly as often as it is wrong, and no rule that looks only at the two words (the shorter, the more
frequent) is better than chance. Only word order differs: there both sentences consist of the same words.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

TWINS = 40
"""Twins of each phenomenon: half as many as items."""

Card = TypeVar("Card")


class Item(NamedTuple):
    """A sentence and its wrong neighbour; the parts are empty where they differ in more than one word."""

    sentence_good: str
    sentence_bad: str
    prefix: str = ""
    good: str = ""
    bad: str = ""
    rest: str = ""


class Frame(NamedTuple):
    """A sentence, cut round the word that will differ."""

    prefix: str
    word: str
    rest: str

    def item(self, bad: str) -> Item:
        """This sentence as the right one, with a wrong word in its twin's place."""
        right, wrong = (f"{self.prefix} {word} {self.rest}" for word in (self.word, bad))
        return Item(right, wrong, self.prefix, self.word, bad, self.rest)


class Dealer:
    """Deals every list of words like cards: each once before any comes again, in an order that its name decides."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(name).random  # the only draw that Python promises to keep the same for ever
        self._decks: dict[Sequence[object], list[object]] = {}

    def __call__(self, cards: Sequence[Card]) -> Card:
        deck: list[Card] = self._decks.setdefault(cards, [])  # type: ignore[assignment]
        if not deck:
            deck.extend(sorted(cards, key=lambda _: self._random()))
        return deck.pop()


def words(text: str) -> tuple[str, ...]:
    """Cards with a single text each, by line or semicolon."""
    return tuple(card.strip() for card in text.replace("\n", ";").split(";") if card.strip())


def table(text: str) -> tuple[tuple[str, ...], ...]:
    """Rows by line or semicolon, cells by a bar."""
    return tuple(tuple(cell.strip() for cell in row.split("|")) for row in words(text))


def twins(first: tuple[str, str, str], second: tuple[str, str, str]) -> list[Item]:
    """Two frames, each wrong with the other's word."""
    one, other = Frame(*first), Frame(*second)
    return [one.item(other.word), other.item(one.word)]


BOYS = ("Tom", "Jack", "John", "Peter", "James", "Robert", "William", "Henry")
GIRLS = ("Lily", "Mary", "Anna", "Lucy", "Jane", "Elizabeth", "Alice", "Emma")
CHILDREN = BOYS + GIRLS
PEOPLE = table(
    """boy | boys; girl | girls; king | kings; teacher | teachers; doctor | doctors; farmer | farmers; soldier | soldiers
    writer | writers; brother | brothers; sister | sisters; child | children; man | men; woman | women; student | students
    player | players; friend | friends; neighbor | neighbors; singer | singers; prince | princes; officer | officers"""
)
ANIMALS = table(
    "dog | dogs; cat | cats; bird | birds; horse | horses; bear | bears; duck | ducks; rabbit | rabbits; cow | cows"
)
THINGS = table(
    """car | cars; house | houses; book | books; tree | trees; ship | ships; box | boxes; ball | balls; letter | letters
    picture | pictures; flower | flowers; road | roads; bridge | bridges; song | songs; story | stories; boat | boats
    door | doors; stone | stones; chair | chairs; train | trains; tower | towers"""
)
STARTS = (
    "The",
    "The old",
    "The young",
    "The other",
    "The little",
    "The poor",
    "The first",
    "The rich",
    "The happy",
    "The tall",
)
WHERE = words("in the garden.; near the river.; on the road.; in the park.; at the door.; behind the house.; in the city.")

AUXILIARIES = table(
    """is | are | very happy.; is | are | not at home today.; is | are | in the garden.; is | are | from England.
    was | were | tired after the long day.; was | were | born in the south.; was | were | not ready.; was | were | at school.
    has | have | a house near the river.; has | have | been here before.; has | have | a lot of money.; has | have | to go.
    does | do | not like the rain.; does | do | not know the answer."""
)
VERBS = table(
    """likes | like | to read.; wants | want | to go home.; lives | live | in a small town.; needs | need | some help.
    goes | go | to the park.; comes | come | from the north.; makes | make | good bread.; says | say | that it is late.
    takes | take | the train.; gives | give | us some food.; thinks | think | about the war.; loves | love | the sea.
    plays | play | in the park.; works | work | in the city.; looks | look | very tired.; feels | feel | much better now.
    knows | know | the answer.; tells | tell | us a story.; helps | help | the poor.; leaves | leave | in the morning."""
)
BESIDE = ("near", "with", "behind", "next to", "in front of")
OTHERS = tuple(noun for pair in ANIMALS + THINGS for noun in pair)
FROM = ("of the village", "in the picture", "from London", "at the school", "on the hill", "from the north", "in the house")
CLAUSES = words("that saw the; that liked the; that found the; who lost the; who loved the; that followed the; who had the")
SHORT_CLAUSES = words("who came here; that I saw; he likes; who went to London; that we know; she loved; who lost the game")
MARKED = table(
    "This | These; That | Those; One | Two; Another | Several; Every | Most; The only | The three; A young | Some young"
)


def agreement_auxiliary(deal: Dealer) -> list[Item]:
    """Is, has, does after the subject."""
    return agreement(deal, deal(AUXILIARIES), (deal(STARTS),))


def agreement_verb(deal: Dealer) -> list[Item]:
    """Any other verb after the subject."""
    return agreement(deal, deal(VERBS), (deal(STARTS),))


def agreement_prepositional_phrase(deal: Dealer) -> list[Item]:
    """Another noun between, in every second pair of twins one whose number misleads in one of them."""
    between = f" {deal(BESIDE)} the {deal(OTHERS)}" if deal((True, False)) else f" {deal(FROM)}"
    return agreement(deal, deal(AUXILIARIES), deal(MARKED), between)


def agreement_relative_clause(deal: Dealer) -> list[Item]:
    """A clause between, in every second pair of twins one that ends in a noun."""
    between = f" {deal(CLAUSES)} {deal(OTHERS)}" if deal((True, False)) else f" {deal(SHORT_CLAUSES)}"
    return agreement(deal, deal(AUXILIARIES), deal(MARKED), between)


def agreement(deal: Dealer, verb: tuple[str, ...], starts: tuple[str, ...], between: str = "") -> list[Item]:
    """A subject in both numbers, after one start or one of its own each, and both forms of a verb."""
    (one, many), (singular, plural, rest) = deal(PEOPLE), verb
    return twins((f"{starts[0]} {one}{between}", singular, rest), (f"{starts[-1]} {many}{between}", plural, rest))


HE = (*words("The king; The boy; The man; The prince; His father; Her brother; My uncle; The old man; Their son"), *BOYS)
SHE = ("The queen", "The girl", "The woman", "The princess", "His mother", "Her sister", "My aunt", "Their daughter", *GIRLS)
THEY = ("The boys", "The girls", "The children", "The soldiers", "The men", "The women", "Her parents", "The workers")
KINDS = (((HE, "himself"), (SHE, "herself")), ((HE, "himself"), (THEY, "themselves")), ((SHE, "herself"), (THEY, "themselves")))
DONE_TO_SELF = table(
    """saw | in the mirror.; hurt | on the way home.; asked | what to do.; told | to be brave.; had to defend | in court.
    looked after | for many years.; made | a cup of tea.; found | in a dark forest.; could not help | any more.
    hid | behind the tree.; never talked about | again.; kept | warm in the winter."""
)
OWN = table(
    """closed | eyes and slept.; lost | way in the forest.; held | breath for a moment.; did | best to help.
    changed | mind the next day.; shook | head and went away.; opened | eyes in the dark.; kept | promise to come back.
    soon made up | mind to leave.; could not believe | eyes.; turned | back to the wall."""
)
POSSESSIVES = {"himself": "his", "herself": "her", "themselves": "their"}


def reflexive(deal: Dealer) -> list[Item]:
    """Himself, herself, themselves."""
    (verb, rest), ((one, word), (other, another)) = deal(DONE_TO_SELF), deal(KINDS)
    return twins((f"{deal(one)} {verb}", word, rest), (f"{deal(other)} {verb}", another, rest))


def possessive(deal: Dealer) -> list[Item]:
    """What can only be one's own: to lose his, her, their way."""
    (verb, rest), ((one, word), (other, another)) = deal(OWN), deal(KINDS)
    return twins((f"{deal(one)} {verb}", POSSESSIVES[word], rest), (f"{deal(other)} {verb}", POSSESSIVES[another], rest))


SEEN = ("saw", "liked", "found", "looked at", "wanted", "asked about", "pointed at", "loved", "talked about", "thought of")
DETERMINERS = table("this | these; that | those; this | these; that | those; this old | these old; that big | those big")
NUMBERS = ("two", "three", "four", "five", "six", "ten", "several", "many", "two big", "three small", "both", "a few")
SINGLE = ("one", "only one", "another", "one small", "every", "one big")
NUMBERED = ("Tom saw", "They found", "We had", "The man bought", "She knew", "He painted", "The girl drew", "They sold")


def determiner_noun(deal: Dealer) -> list[Item]:
    """This dog, these dogs."""
    start, (one, many) = f"{deal(CHILDREN)} {deal(SEEN)}", deal(ANIMALS + THINGS)
    (near, far), rest = deal(DETERMINERS), deal(WHERE)
    return twins((f"{start} {near}", one, rest), (f"{start} {far}", many, rest))


def number_noun(deal: Dealer) -> list[Item]:
    """One dog, three dogs."""
    start, (one, many), rest = deal(NUMBERED), deal(ANIMALS + THINGS), deal(WHERE)
    return twins((f"{start} {deal(SINGLE)}", one, rest), (f"{start} {deal(NUMBERS)}", many, rest))


MASSES = ("water", "money", "time", "food", "work", "snow", "milk", "music", "help", "rain", "gold", "power", "space", "blood")
COUNTED = words("friends; books; toys; trees; people; children; birds; cars; words; questions; houses; soldiers")
AMOUNTS = table(
    "too much | too many; so much | so many; as much | as many; a great deal of | a great number of; a bit of | a couple of"
)
HAVING = ("We saw", "They had", "He wanted", "She found", "Tom needed", "They brought", "You have", "The king had")


def much_many(deal: Dealer) -> list[Item]:
    """Much water, many books."""
    (much, many), start, rest = deal(AMOUNTS), deal(HAVING), deal(WHERE)
    return twins((f"{start} {much}", deal(MASSES), rest), (f"{start} {many}", deal(COUNTED), rest))


FORMS = table(
    """go | went | gone | going | to the sea.; eat | ate | eaten | eating | a red apple.
    see | saw | seen | seeing | the king.; take | took | taken | taking | the book.
    give | gave | given | giving | him a ball.; write | wrote | written | writing | songs.
    fall | fell | fallen | falling | into the water.; break | broke | broken | breaking | the window.
    speak | spoke | spoken | speaking | to her.; throw | threw | thrown | throwing | the ball.
    draw | drew | drawn | drawing | a tree.; drive | drove | driven | driving | the car.
    forget | forgot | forgotten | forgetting | the name.; do | did | done | doing | the work.
    ride | rode | ridden | riding | a horse.; choose | chose | chosen | choosing | the blue hat."""
)
CUES = (
    ("will", "can", "did not", "wanted to", "must", "could not", "tried to"),
    ("then", "suddenly", "soon", "also", "never"),
    ("has", "has never", "had", "has already", "had just"),
    ("is", "was", "is now", "was not", "enjoyed", "kept on", "was afraid of"),
)
"""What comes before the base, the past, the participle, and the form in -ing."""
CONTRASTS = ((0, 1), (0, 2), (0, 3), (1, 2))


def verb_form(deal: Dealer) -> list[Item]:
    """Will go, then went, has gone, is going."""
    subject, (*forms, rest), (one, other) = f"{deal(STARTS)} {deal(PEOPLE)[0]}", deal(FORMS), deal(CONTRASTS)
    return twins((f"{subject} {deal(CUES[one])}", forms[one], rest), (f"{subject} {deal(CUES[other])}", forms[other], rest))


ARTICLES = table(
    """ate | apple | cake; ate | egg | banana; ate | orange | cookie; saw | elephant | lion; saw | owl | bird
    met | artist | doctor; met | actor | singer; was | author | writer; was | officer | soldier; had | uncle | friend
    lived on | island | farm; worked in | office | school; built | airport | station; had | idea | plan
    gave | answer | reason; made | album | book; saw | animal | tree; bought | umbrella | hat; was | engineer | teacher
    heard | order | song"""
)
ADJECTIVES = table(
    "old | new; important | great; early | late; angry | happy; easy | hard; empty | full; ugly | beautiful; odd | long"
)
DESCRIBED = ("house", "man", "day", "letter", "story", "dog", "town", "name")


def article(deal: Dealer) -> list[Item]:
    """An apple, a banana; an old house, a new house."""
    name, rest = deal(CHILDREN), deal(WHERE)
    if deal((True, False)):
        verb, vowel, consonant = deal(ARTICLES)
    else:
        verb, (vowel, consonant) = deal(("saw", "found", "had", "heard of")), deal(ADJECTIVES)
        rest = f"{deal(DESCRIBED)} {rest}"
    return twins((f"{name} {verb} an", vowel, rest), (f"{name} {verb} a", consonant, rest))


PREPOSITIONS = table(
    """was afraid | of | the dark. | listened | to | the radio.
    was interested | in | old books. | borrowed money | from | a friend.
    depended | on | the weather. | was born | in | the spring.
    was famous | for | his songs. | was full | of | good ideas.; belonged | to | the king. | was made | of | gold.
    was different | from | the others. | was very good | at | sports.
    was waiting | for | the train. | was married | to | a teacher.; laughed | at | the joke. | was proud | of | the team.
    was filled | with | water. | was based | on | a novel.
    was a member | of | the club. | fell in love | with | the doctor.
    was similar | to | the first one. | took part | in | the game.
    arrived | at | the station. | was one | of | the best.
    was covered | with | snow. | was responsible | for | the work.
    was kind | to | the animals. | was tired | of | waiting.
    asked | for | more food. | looked forward | to | the summer.
    spent a lot of money | on | new clothes. | was next | to | the door.
    was accused | of | murder. | was ready | for | the winter.; believed | in | God. | was angry | with | the boy.
    agreed | with | the teacher. | thought | of | a new plan.; paid | for | the meal. | was sure | of | the answer."""
)


def preposition(deal: Dealer) -> list[Item]:
    """Afraid of, listened to."""
    one, word, rest, other, another, end = deal(PREPOSITIONS)
    return twins((f"{deal(HE)} {one}", word, rest), (f"{deal(SHE)} {other}", another, end))


NEGATIVE = table(
    """did not see | anything | saw | nothing; had not met | anyone | had met | nobody; did not have | any | had | no
    has not | ever | has | never; did not hear | anything | heard | nothing; had not | ever | had | never
    left without | any | left with | no; did not want | any | wanted | no; could not find | anyone | found | nobody
    did not buy | anything | bought | nothing"""
)
NEGATIVE_RESTS = {"any": ("money.", "friends.", "food.", "help."), "ever": ("been to London.", "seen a lion.", "lost a game.")}


def negation(deal: Dealer) -> list[Item]:
    """Did not see anything, saw nothing."""
    subject, (one, word, other, another) = deal(CHILDREN), deal(NEGATIVE)
    rest = deal(NEGATIVE_RESTS.get(word, WHERE))
    return twins((f"{subject} {one}", word, rest), (f"{subject} {other}", another, rest))


COMING = ("came from the north.", "was lost in the storm.", "arrived last week.", "had been in the war.", "looked very old.")


def relative_pronoun(deal: Dealer) -> list[Item]:
    """The man who, the ship which."""
    start, rest = f"{deal(CHILDREN)} {deal(SEEN)}", deal(COMING)
    return twins((f"{start} the {deal(PEOPLE)[0]}", "who", rest), (f"{start} the {deal(THINGS)[0]}", "which", rest))


OBJECTS = {
    "drank a glass of": ("water", "milk", "juice", "wine"),
    "read a very long": ("letter", "story", "book", "poem"),
    "put on a warm": ("hat", "coat", "dress", "shirt"),
    "drove a fast": ("car", "bus", "truck", "train"),
    "ate a piece of": ("bread", "cake", "meat", "cheese"),
    "climbed up the tall": ("tree", "mountain", "hill", "tower"),
    "swam across the": ("river", "sea", "lake", "ocean"),
    "hurt the left": ("leg", "arm", "foot", "hand"),
    "was born last": ("week", "month", "year", "summer"),
    "listened to a beautiful": ("song", "voice", "sound", "piece"),
    "won the last": ("game", "battle", "race", "election"),
}
STRANGERS = table(
    """drank a glass of | read a very long; put on a warm | drove a fast; ate a piece of | climbed up the tall
    swam across the | hurt the left; was born last | listened to a beautiful; won the last | drank a glass of
    read a very long | put on a warm; drove a fast | ate a piece of; swam across the | was born last
    hurt the left | climbed up the tall"""
)
"""Of these two neither can take what the other takes."""


def collocation(deal: Dealer) -> list[Item]:
    """Drank a glass of water, read a very long letter."""
    (one, other), rest = deal(STRANGERS), deal(WHERE)
    return twins((f"{deal(HE)} {one}", deal(OBJECTS[one]), rest), (f"{deal(SHE)} {other}", deal(OBJECTS[other]), rest))


PHRASES = table(
    """waited for a long | time | at the door. | swam to the other | side | of the river.
    lived in New | York | for a year. | was in the United | States | for a year.
    fought in the First World | War | as a boy. | wrote to the Prime | Minister | of England.
    left high | school | in the spring. | died in a car | accident | in the spring.
    fell | asleep | at once. | walked | home | at once.
    took a deep | breath | and sang. | took part in the | game | and won.
    loved his mother and | father | very much. | worked day and | night | for them.
    walked up and | down | in the hall. | ran back and | forth | in the hall.
    ate bread and | butter | every morning. | met the king and | queen | every year.
    painted it black and | white | one day. | had many brothers and | sisters | at home.
    asked again and | again | for help. | came with friends and | family | for dinner.
    wrote about war and | peace | for years. | looked from left to | right | in the dark.
    told them the whole | truth | about it. | lived happily ever | after | in the forest.
    played a major | role | in the war. | paid no | attention | to the noise.
    changed his | mind | too late. | did his | best | to win.
    was born on the same | day | as I. | won the gold | medal | for England.
    went all over the | world | by ship. | came home the next | day | by train.
    studied at the | University | of London. | was elected | President | of France.
    was the first African | American | in the team. | was killed in the Second World | War | in France.
    had blue | eyes | and a hat. | had a broken | leg | and a dog.
    lit a big | fire | in the snow. | heard a loud | noise | in the dark."""
)


def fixed_phrase(deal: Dealer) -> list[Item]:
    """For a long time, the other side."""
    one, word, rest, other, another, end = deal(PHRASES)
    return twins((f"{deal(BOYS)} {one}", word, rest), (f"{deal(BOYS)} {other}", another, end))


ORDERS = table(
    """The big old {thing} stood in the garden. | The old big {thing} stood in the garden.
    {name} picked it up near the {thing}. | {name} picked up it near the {thing}.
    The {person} was not old enough for the {thing}. | The {person} was not enough old for the {thing}.
    {name} asked where the {thing} was. | {name} asked where was the {thing}.
    {name} forgot when the {person} had come. | {name} forgot when had the {person} come.
    The {person} has always lived near the {thing}. | The {person} has lived always near the {thing}.
    The {person} knew the {thing} very well. | The {person} knew very well the {thing}.
    They stayed near the {thing} the whole day. | They stayed near the {thing} the day whole.
    Then all the {people} looked at the {thing}. | Then the all {people} looked at the {thing}.
    For {name} it was such a big {thing}. | For {name} it was a such big {thing}.
    {name} found the {thing} ten years ago. | {name} found the {thing} ago ten years.
    {name} gave the {animal} some food. | {name} gave some food the {animal}.
    They did not know how old the {thing} was. | They did not know how the {thing} was old.
    {name} saw nobody else near the {thing}. | {name} saw else nobody near the {thing}."""
)


def word_order(deal: Dealer) -> list[Item]:
    """Where the picture was, where was the picture."""

    def one() -> Item:
        cards = {
            "thing": deal(THINGS)[0],
            "animal": deal(ANIMALS)[0],
            "person": deal(PEOPLE)[0],
            "people": deal(PEOPLE)[1],
            "name": deal(CHILDREN),
        }
        good, bad = (order.format(**cards) for order in deal(ORDERS))
        return Item(good, bad)

    return [one(), one()]


PHENOMENA: tuple[Callable[[Dealer], list[Item]], ...] = (
    agreement_auxiliary,
    agreement_verb,
    agreement_prepositional_phrase,
    agreement_relative_clause,
    reflexive,
    possessive,
    determiner_noun,
    number_noun,
    much_many,
    verb_form,
    article,
    preposition,
    negation,
    relative_pronoun,
    collocation,
    fixed_phrase,
    word_order,
)


def different(phenomenon: Callable[[Dealer], list[Item]]) -> Iterator[list[Item]]:
    """Twins of a phenomenon without end, none of whose sentences were there before."""
    deal, seen = Dealer(phenomenon.__name__), set[str]()
    while True:
        items = phenomenon(deal)
        sentences = {sentence for item in items for sentence in (item.sentence_good, item.sentence_bad)}
        if len(sentences) == 4 and not sentences & seen:
            seen |= sentences
            yield items


def lines() -> Iterator[str]:
    """The file, line by line; phenomena take turns, so that the first items of the file are a sample of all."""
    number = 0
    supplies = [(phenomenon.__name__, different(phenomenon)) for phenomenon in PHENOMENA]
    for _ in range(TWINS):
        for name, supply in supplies:
            for item in next(supply):
                yield json.dumps({"id": number, "phenomenon": name} | item._asdict()) + "\n"
                number += 1


if __name__ == "__main__":
    Path(__file__).with_name("pairs.jsonl").write_text("".join(lines()), encoding="ascii", newline="\n")
