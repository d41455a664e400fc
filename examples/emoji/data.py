"""Emoji images and captions, from two npm packages: which emoji, and how they are described.

``emoji-datasource-twitter`` has the images (Twemoji, CC-BY 4.0) and their categories, ``emojilib`` (MIT) has names and
keywords. Both are downloaded by ``npm pack``. The images are no part of this repository; ``descriptions.json`` has the
names, keywords and categories.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

IMAGES, KEYWORDS = "emoji-datasource-twitter-16.0.0", "emojilib-4.0.2"  # name and version
KEYWORDS_PER_EMOJI = 4
DESCRIPTIONS = Path(__file__).parent / "descriptions.json"

# Short names in the data source. The choice is small enough for hours of training on a CPU. It leaves out
# near-duplicates, people of several skin tones, most flags, and what few people could name.
CHOSEN = """
grinning laughing joy upside_down_face heart_eyes star-struck stuck_out_tongue_winking_eye thinking_face
sleeping mask nauseated_face cold_face exploding_head face_with_cowboy_hat partying_face sunglasses nerd_face
face_with_monocle cry sob scream angry smiling_imp skull clown_face japanese_goblin ghost alien space_invader
robot_face smiley_cat heart_eyes_cat
heart yellow_heart green_heart blue_heart purple_heart black_heart broken_heart wave ok_hand v +1 -1 fist muscle
ear nose eye eyes brain tooth bone footprints baby farmer astronaut ninja santa fairy vampire mermaid
monkey gorilla dog wolf fox_face raccoon cat black_cat lion_face tiger horse moose unicorn_face zebra_face deer
cow pig pig_nose goat camel giraffe_face elephant rhinoceros hippopotamus mouse rat hamster rabbit beaver
hedgehog bat bear polar_bear koala panda_face sloth kangaroo feet turkey rooster hatched_chick bird penguin
dove_of_peace eagle duck swan owl feather flamingo peacock parrot frog crocodile turtle snake dragon sauropod
t-rex whale dolphin fish tropical_fish blowfish shark octopus shell coral jellyfish crab lobster shrimp snail
butterfly bug bee beetle ladybug spider spider_web scorpion
bouquet cherry_blossom rose hibiscus sunflower tulip seedling potted_plant evergreen_tree deciduous_tree
palm_tree cactus shamrock maple_leaf nest_with_eggs mushroom
grapes watermelon tangerine lemon banana pineapple mango apple pear peach cherries strawberry blueberries
kiwifruit tomato avocado eggplant potato carrot corn hot_pepper bell_pepper cucumber broccoli onion bread
croissant baguette_bread pretzel pancakes waffle cheese_wedge meat_on_bone poultry_leg hamburger fries pizza
hotdog sandwich taco egg fried_egg green_salad popcorn rice_ball ramen spaghetti sushi dumpling fortune_cookie
icecream doughnut cookie birthday cake cupcake chocolate_bar candy lollipop honey_pot glass_of_milk coffee
teapot wine_glass cocktail tropical_drink beer bubble_tea ice_cube chopsticks spoon hocho
earth_americas snow_capped_mountain volcano camping beach_with_umbrella desert_island classical_building house
factory european_castle tokyo_tower statue_of_liberty fountain ferris_wheel steam_locomotive bus ambulance
fire_engine police_car taxi car pickup_truck tractor racing_car motor_scooter bike scooter skateboard
roller_skate rotating_light traffic_light octagonal_sign anchor boat canoe ship airplane parachute helicopter
rocket flying_saucer
hourglass watch alarm_clock full_moon crescent_moon sunny sun_with_face ringed_planet star cloud rain_cloud
lightning tornado rainbow closed_umbrella umbrella zap snowflake snowman comet fire droplet ocean
jack_o_lantern christmas_tree fireworks sparkles balloon tada gift ticket trophy first_place_medal soccer
baseball basketball volleyball football tennis bowling table_tennis_paddle_and_ball boxing_glove golf ice_skate
fishing_pole_and_fish diving_mask dart kite gun 8ball crystal_ball magic_wand video_game game_die jigsaw
teddy_bear spades hearts diamonds clubs chess_pawn art yarn
eyeglasses dark_sunglasses necktie shirt jeans gloves socks dress bikini handbag school_satchel athletic_shoe
high_heel boot crown womans_hat tophat mortar_board lipstick ring gem mega bell musical_note headphones radio
saxophone accordion guitar trumpet violin drum_with_drumsticks harp iphone battery computer floppy_disk cd tv
camera mag candle bulb closed_book green_book scroll newspaper moneybag coin dollar email package pencil2
lower_left_paintbrush lower_left_crayon briefcase calendar pushpin paperclip scissors wastebasket lock key
hammer axe crossed_swords bomb boomerang bow_and_arrow shield wrench gear scales magnet ladder dna microscope
telescope syringe pill door bed chair toilet bathtub broom toothbrush fire_extinguisher shopping_trolley
headstone moyai
warning no_entry radioactive_sign yin_yang peace_symbol recycle x white_check_mark red_circle
large_yellow_circle large_green_circle large_blue_circle large_red_square large_blue_square checkered_flag
rainbow-flag pirate_flag fr it jp
"""


@dataclass(frozen=True)
class Description:
    """An emoji's name, keywords and category, such as "Animals & Nature"."""

    name: str
    keywords: tuple[str, ...]
    category: str


@dataclass(frozen=True)
class Emoji(Description):
    """One emoji: ``image`` has the shape (3, 64, 64), in uint8."""

    image: torch.Tensor


def descriptions() -> list[Description]:
    """Those of the chosen emoji, in the order of ``load``. Nothing is downloaded."""
    return [
        Description(**entry | {"keywords": tuple(entry["keywords"])}) for entry in json.loads(DESCRIPTIONS.read_text())
    ]


def write_descriptions(emoji: Sequence[Emoji]) -> None:
    """Write what ``descriptions`` reads, one emoji a line."""
    lines = [json.dumps({"name": e.name, "keywords": e.keywords, "category": e.category}) for e in emoji]
    DESCRIPTIONS.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def load(folder: Path) -> list[Emoji]:
    """The chosen emoji, on white. Downloads the packages into ``folder`` unless they are there."""
    with tarfile.open(package(KEYWORDS, folder)) as members:
        words = json.load(members.extractfile("package/dist/emoji-en-US.json"))  # type: ignore[arg-type]
    words = {without_variation(character): entry for character, entry in words.items()}
    with tarfile.open(package(IMAGES, folder)) as members:
        entries = json.load(members.extractfile("package/emoji.json"))  # type: ignore[arg-type]
        names = set(CHOSEN.split())
        chosen = {f"package/img/twitter/64/{e['image']}": e for e in entries if e["short_name"] in names}
        images = {file: on_white(members.extractfile(file)) for file in chosen}  # type: ignore[arg-type]
    emoji = []
    for file, entry in sorted(chosen.items(), key=lambda item: item[1]["sort_order"]):
        character = without_variation("".join(chr(int(code, 16)) for code in entry["unified"].split("-")))
        name, *keywords = map(plain, words.get(character, [entry["short_name"]]))
        emoji.append(Emoji(name, informative(name, keywords), entry["category"], images[file]))
    return emoji


def package(name: str, folder: Path) -> Path:
    """The package's archive in ``folder``."""
    archive = folder / f"{name}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            subprocess.run(["npm", "pack", "--silent", "@".join(name.rsplit("-", 1))], cwd=beside, check=True)
            Path(beside, archive.name).replace(archive)
    return archive


def without_variation(character: str) -> str:
    return character.replace("\ufe0f", "")


def plain(text: str) -> str:
    """Lower-case words of letters and digits."""
    return " ".join(re.findall("[a-z0-9]+", text.lower()))


def informative(name: str, keywords: list[str]) -> tuple[str, ...]:
    """The first keywords of one or two words that do not repeat the name."""
    used = set(name.split())
    kept = [k for k in dict.fromkeys(keywords) if len(k) > 2 and len(k.split()) <= 2 and not used & set(k.split())]
    return tuple(kept[:KEYWORDS_PER_EMOJI])


def on_white(file: IO[bytes]) -> torch.Tensor:
    image = Image.open(file).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return torch.from_numpy(np.array(Image.alpha_composite(white, image).convert("RGB"))).permute(2, 0, 1).contiguous()


def known_captions(emoji: Description) -> list[str]:
    """The captions that models are trained on: the name with none, one or two keywords."""
    name, keywords = emoji.name, emoji.keywords
    pairs = list(itertools.combinations(keywords, 2))[1:]
    return [name, f"{name} emoji", f"a picture of {name}"] + [", ".join((name, *w)) for w in (*zip(keywords), *pairs)]


def held_out_caption(emoji: Description) -> str | None:
    """The name with two keywords that no known caption has together; ``None`` for an emoji with fewer than two."""
    return ", ".join((emoji.name, *emoji.keywords[:2])) if len(emoji.keywords) > 1 else None
