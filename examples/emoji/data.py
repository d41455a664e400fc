"""Emoji images and captions, from two npm packages: which emoji, and how they are described.

``emoji-datasource-twitter`` has the images (Twemoji, CC-BY 4.0) and their categories, ``emojilib`` (MIT) has names and
keywords. Both are downloaded by ``npm pack``; nothing of them is part of this repository.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

IMAGES, KEYWORDS = "emoji-datasource-twitter-16.0.0", "emojilib-4.0.2"  # name and version
KEYWORDS_PER_EMOJI = 4

# Of the other subcategories of the data source (people, clocks, flags, signs, symbols), none or the listed ones are used.
SUBCATEGORIES = frozenset(
    """
    face-smiling face-affection face-tongue face-hat face-glasses face-negative face-costume cat-face heart
    animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug plant-flower plant-other
    food-fruit food-vegetable food-prepared food-asian food-sweet drink dishware
    place-geographic place-building transport-ground transport-water transport-air
    event sport game musical-instrument clothing tool light_&_video household science
    """.split()
)
ALSO = frozenset(
    """
    nauseated_face hot_face cold_face exploding_head mask sleeping cry sob scream see_no_evil thinking_face
    wave +1 -1 fist v ok_hand muscle ear nose eyes eye tongue brain tooth bone lips footprints
    baby santa astronaut cook farmer mermaid fairy vampire ninja dancer surfer
    earth_americas fountain tent ferris_wheel hourglass watch alarm_clock
    full_moon crescent_moon sunny sun_with_face ringed_planet star cloud rain_cloud lightning tornado rainbow
    closed_umbrella umbrella zap snowflake snowman fire droplet ocean comet
    trophy first_place_medal art yarn thread bell mega musical_note headphones radio iphone telephone
    battery computer desktop_computer printer keyboard floppy_disk cd books closed_book green_book blue_book
    scroll newspaper moneybag coin dollar email package mailbox pencil2 lower_left_crayon lower_left_paintbrush memo
    briefcase file_folder calendar pushpin paperclip scissors straight_ruler wastebasket lock key
    syringe pill stethoscope adhesive_bandage moyai headstone smoking
    warning no_entry radioactive_sign recycle atom_symbol yin_yang peace_symbol x white_check_mark
    red_circle large_blue_circle large_green_circle large_yellow_circle large_red_square large_blue_square
    checkered_flag rainbow-flag pirate_flag jp fr it ca
    """.split()
)
# Near-duplicates of others, and images that hardly anyone could name.
EXCLUDED = frozenset(
    """
    smile grin smiley relaxed kissing kissing_closed_eyes kissing_smiling_eyes slightly_smiling_face wink
    stuck_out_tongue_closed_eyes stuck_out_tongue smirk_cat kissing_cat smile_cat pouting_cat rage hankey imp
    skull_and_crossbones japanese_ogre heartpulse heartbeat revolving_hearts gift_heart cupid love_letter
    heart_decoration heavy_heart_exclamation_mark_ornament mending_heart grey_heart light_blue_heart
    guide_dog service_dog cat2 dog2 cow2 pig2 mouse2 rabbit2 tiger2 racehorse water_buffalo bison
    dromedary_camel hatching_chick baby_chick whale2 dragon_face rosette white_flower black_bird donkey
    herb leaves leafless_tree empty_nest sleeping_accommodation brown_mushroom green_apple ginger_root root_vegetable
    stuffed_flatbread flatbread tamale falafel fondue shallow_pan_of_food rice_cracker oden dango fish_cake
    beers clinking_glasses champagne pouring_liquid mate_drink beverage_box fork_and_knife jar bowl_with_spoon
    building_construction house_buildings derelict_house_building house_with_garden post_office european_post_office
    hotel love_hotel convenience_store department_store school bank wedding office hut national_park desert
    bullettrain_front train2 metro light_rail station tram mountain_railway monorail bullettrain_side railway_car
    oncoming_bus trolleybus minibus oncoming_police_car oncoming_taxi oncoming_automobile truck busstop motorway
    railway_track vertical_traffic_light construction wheel motorized_wheelchair auto_rickshaw
    passenger_ship ferry motor_boat airplane_departure airplane_arriving seat suspension_railway mountain_cableway
    aerial_tramway small_airplane satellite tanabata_tree bamboo dolls flags wind_chime rice_scene reminder_ribbon
    admission_tickets confetti_ball sparkler red_envelope goal_net running_shirt_with_sash field_hockey_stick_and_ball
    mahjong flower_playing_cards black_joker slot_machine pinata nesting_dolls long_drum
    lab_coat sari briefs shorts pouch shopping_bags thong_sandal womans_flat_shoe sandal hair_pick
    military_helmet helmet_with_white_cross prayer_beads one-piece_swimsuit folding_hand_fan purse womans_clothes
    pick hammer_and_pick carpentry_saw compression broken_chain nut_and_bolt probing_cane link chains dagger_knife
    film_frames film_projector video_camera camera_with_flash mag_right izakaya_lantern diya_lamp vhs clapper
    elevator mirror window plunger shower mouse_trap lotion_bottle safety_pin roll_of_paper bubbles sponge razor
    petri_dish satellite_antenna alembic
    """.split()
)


@dataclass(frozen=True)
class Emoji:
    """One emoji: ``image`` has the shape (3, 64, 64), in uint8."""

    name: str
    keywords: tuple[str, ...]
    image: torch.Tensor


def load(folder: Path) -> list[Emoji]:
    """The chosen emoji, on white. Downloads the packages into ``folder`` unless they are there."""
    with tarfile.open(package(KEYWORDS, folder)) as members:
        words = json.load(members.extractfile("package/dist/emoji-en-US.json"))  # type: ignore[arg-type]
    words = {without_variation(character): entry for character, entry in words.items()}
    with tarfile.open(package(IMAGES, folder)) as members:
        entries = json.load(members.extractfile("package/emoji.json"))  # type: ignore[arg-type]
        folder_in_package = "package/img/twitter/64/"
        chosen = {folder_in_package + entry["image"]: entry for entry in entries if is_chosen(entry)}
        images = {m.name: on_white(members.extractfile(m)) for m in members.getmembers() if m.name in chosen}  # type: ignore[arg-type]
    emoji = []
    for file, entry in sorted(chosen.items(), key=lambda item: item[1]["sort_order"]):
        character = without_variation("".join(chr(int(code, 16)) for code in entry["unified"].split("-")))
        name, *keywords = map(plain, words.get(character, [entry["short_name"]]))
        emoji.append(Emoji(name, informative(name, keywords), images[file]))
    return emoji


def package(name: str, folder: Path) -> Path:
    """The package's archive in ``folder``."""
    archive = folder / f"{name}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", "@".join(name.rsplit("-", 1))], cwd=folder, check=True)
    return archive


def is_chosen(entry: dict[str, Any]) -> bool:
    subcategory = entry["subcategory"].replace(" ", "_")
    listed = subcategory in SUBCATEGORIES or entry["short_name"] in ALSO
    return listed and entry["has_img_twitter"] and entry["short_name"] not in EXCLUDED


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


def known_captions(emoji: Emoji) -> list[str]:
    """The captions that models are trained on: the name with none, one or two keywords."""
    name, keywords = emoji.name, emoji.keywords
    pairs = list(itertools.combinations(keywords, 2))[1:]
    return [name, f"{name} emoji", f"a picture of {name}"] + [", ".join((name, *w)) for w in (*zip(keywords), *pairs)]


def held_out_caption(emoji: Emoji) -> str | None:
    """The name with a pair of keywords that occurs in no known caption together; ``None`` with fewer than two keywords."""
    return ", ".join((emoji.name, *emoji.keywords[:2])) if len(emoji.keywords) > 1 else None
