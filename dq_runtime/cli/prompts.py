"""The built-in prompts of calibration and of comparison: varied in subject, style, light and length."""

from __future__ import annotations

CALIBRATION_PROMPTS = (
    "a lighthouse on a cliff at dusk, oil painting",
    "a bowl of cherries on a wooden table, macro photograph",
    "portrait of an old fisherman, black and white",
    "an astronaut riding a horse on the moon",
    "a city street in the rain at night, neon lights",
    "a red fox in the snow, wildlife photography",
    "a medieval castle above the clouds, digital art",
    "a plate of sushi, studio light",
    "a steam locomotive crossing a stone bridge",
    "an isometric drawing of a tiny library",
    "a field of sunflowers under a stormy sky",
    "a robot watering plants in a greenhouse",
    "a sailing ship in a bottle",
    "a cosy living room with a fireplace, watercolour",
    "an aerial view of a river delta",
    "a hummingbird in flight, high speed photograph",
    "two children flying a kite on a windy beach, film grain",
    "a wooden chair",
    "a bowl of ramen with a soft egg, seen from above, natural light, shallow depth of field",
    "a market in Marrakesh at noon, crowded, warm colours",
    "a knight in rusty armour resting under an oak, concept art",
    "a blue glass vase on a white background, product photograph",
    "a snowy village at night with lit windows, pixel art",
    "an elephant family at a water hole, golden hour",
    "a map of an imaginary island, ink on parchment",
    "a dancer leaping, long exposure, dark stage",
    "a concrete museum building, minimalist architecture",
    "a coral reef with clownfish, underwater photograph",
    "a comic strip panel of a detective in a dim office",
    "a still life with lemons and a skull in the style of a Dutch master",
    "a racing car in a curve, motion blur",
    "the surface of a distant planet with two suns, matte painting, highly detailed",
)
COMPARISON_PROMPTS = (  # calibration does not use them
    "a cat asleep on a pile of books, soft light",
    "a mountain lake with pine trees, morning mist",
    "a bicycle leaning on a blue wall",
    "a wizard reading a map, fantasy illustration",
)
