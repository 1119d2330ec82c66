"""The vocabulary of the built-in tasks: single lower-case words, each noun in one category."""

from collections.abc import Mapping, Sequence


def words(text: str) -> tuple[str, ...]:
    """The words of a text separated by white space."""
    return tuple(text.split())


CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "animals": words("""
        badger bull cow deer donkey elephant frog goose hawk horse lizard mouse owl pig rat sheep spider tiger
        wolf
    """),
    "foods": words("""
        apple bean butter carrot cookie fig grape lemon mango mushroom onion peach pepper plum radish salad
        spinach walnut
    """),
    "tools": words("""
        axe clamp drill hoe mallet pliers razor saw shovel spanner tweezers
    """),
    "clothes": words("""
        apron boot cardigan dress hat jeans pyjamas sandal shirt skirt suit tunic
    """),
    "vehicles": words("""
        aeroplane bicycle canoe ferry kayak moped scooter submarine tractor tricycle wagon
    """),
    "instruments": words("""
        accordion bell clarinet fiddle guitar horn oboe recorder triangle tuba violin
    """),
    "furniture": words("""
        armchair bench cabinet chest cradle curtain desk dresser hammock mattress pillow shelf stool wardrobe
    """),
    "plants": words("""
        acacia cactus daffodil fern iris juniper lily moss palm poppy sunflower violet
    """),
    "jobs": words("""
        actor barber carpenter dentist editor fisherman hunter lawyer miner painter poet sailor soldier waiter
    """),
}

THINGS: tuple[str, ...] = words("""
        album balloon bottle brick button card comb doll feather glass jar kettle lantern magnet medal padlock
        pen picture postcard puzzle sack stamp telescope toy umbrella watch
    """)

NAMES: tuple[str, ...] = words("""
        Adam Alan Amy Arthur Ben Carla Clara Dana Dora Eli Emma Fatima Flora Grace Hans Helen Igor Isaac Jane
        John Julia Karl Kofi Lena Lina Lucas Magnus Marta Mei Mina Nadia Nora Oliver Otto Pavel Petra Quentin
        Ravi Rosa Sandra Sofia Sven Thomas Tom Vera Walter Yara Zoe
    """)

SURNAMES: tuple[str, ...] = words("""
        Abbott Baker Bennett Castro Cooper Davis Ellis Flores Garcia Green Hansen Howard Jensen Khan Kumar Lee
        Mason Mills Moreau Nelson Olsen Parker Porter Reed Sato Singh Taylor Wagner Weber Wood
    """)

CITIES: tuple[str, ...] = words("""
        Accra Athens Bangkok Beirut Bogota Brussels Cairo Copenhagen Delhi Florence Hamburg Havana Istanbul
        Kyoto Lima London Madrid Milan Moscow Nairobi Oslo Prague Riga Santiago Shanghai Sydney Toronto Turin
        Warsaw
    """)

COLOURS: tuple[str, ...] = words("black blue brown golden green grey orange pink purple red silver white yellow")

ADJECTIVES: tuple[str, ...] = words("""
        ancient blue broken cheap cold cracked dark dusty famous fragile green heavy large little modern new
        old plain purple red round shiny simple smooth square tall tiny warm white wooden
    """)

PERSON_ADJECTIVES: tuple[str, ...] = words("""
        angry brave busy calm careful cheerful clever friendly gentle happy honest hungry kind lazy lonely
        lucky nervous old polite proud quiet rich sad shy sleepy strong tall tired wise young
    """)

PLACES: tuple[str, ...] = words("""
        attic balcony basement bedroom castle cellar cottage factory field garage hall hospital kitchen market
        mill office palace pharmacy pub school shop stadium studio theatre tunnel workshop
    """)

VERBS: tuple[tuple[str, str, str, str], ...] = tuple(
    (forms.split("/")[0], forms.split("/")[1], forms.split("/")[2], forms.split("/")[3])
    for forms in words("""
        bring/brings/brought/brought build/builds/built/built carry/carries/carried/carried
        choose/chooses/chose/chosen cover/covers/covered/covered drop/drops/dropped/dropped
        fix/fixes/fixed/fixed get/gets/got/got hold/holds/held/held leave/leaves/left/left
        lift/lifts/lifted/lifted make/makes/made/made move/moves/moved/moved open/opens/opened/opened
        polish/polishes/polished/polished push/pushes/pushed/pushed rent/rents/rented/rented see/sees/saw/seen
        send/sends/sent/sent show/shows/showed/shown take/takes/took/taken touch/touches/touched/touched
        want/wants/wanted/wanted weigh/weighs/weighed/weighed
    """)
)

TOPICS: Mapping[str, tuple[str, ...]] = {
    "sport": words("""
        athlete coach final goal marathon medal referee stadium swimmer tennis trainer
    """),
    "weather": words("""
        blizzard cloud drought forecast gale heatwave lightning rain snow sunshine thunder
    """),
    "politics": words("""
        ballot campaign congress debate embassy law minister party president senator vote
    """),
    "music": words("""
        album choir composer conductor guitarist melody orchestra playlist singer symphony violinist
    """),
    "science": words("""
        astronomer bacteria cell enzyme formula gene laboratory molecule orbit planet theory
    """),
    "business": words("""
        bank broker company customer economy invoice manager merger profit salary tax
    """),
    "cooking": words("""
        baking chef dinner flavour gravy ingredient menu pastry roast seasoning spice
    """),
}

_IRREGULAR_PLURALS: Mapping[str, str] = {
    "fox": "foxes", "goose": "geese", "mouse": "mice", "sheep": "sheep", "wolf": "wolves", "deer": "deer",
    "knife": "knives", "shelf": "shelves", "scarf": "scarves", "potato": "potatoes", "tomato": "tomatoes",
    "mango": "mangoes", "fisherman": "fishermen",
}  # fmt: skip

NUMBER_WORDS: tuple[str, ...] = words("""
        zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen
    """)


def plural(noun: str) -> str:
    """The plural of a countable noun of this vocabulary."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh", "z")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def with_article(phrase: str) -> str:
    """`phrase` with the indefinite article, a or an."""
    # The u of "ukulele" is pronounced as in "you".
    starts_with_vowel_sound = phrase.startswith("honest") or (phrase[0] in "aeiou" and not phrase.startswith("uku"))
    return f"{'an' if starts_with_vowel_sound else 'a'} {phrase}"


def join_phrases(phrases: Sequence[str]) -> str:
    """`phrases` as a list in prose: "a", "a and b", "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
