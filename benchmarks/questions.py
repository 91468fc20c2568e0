"""The demo's data: `python -m benchmarks.questions` asks SmolLM2-135M-Instruct, and writes okd/questions/*.jsonl.

Each question has a subject of its own, so that those held out ask about what no training question mentions; answers are
greedy, by the demo's teacher, and only those that it ends itself, in at most `LONGEST` tokens, are kept. An hour of one
core. The weights are under the Apache License 2.0.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from okd.answers import generate_answers
from okd.encoding import encode
from okd.models import SMOLLM2, load_model, load_tokenizer

LONGEST = 56  # tokens of an answer
HELD_OUT = 64  # questions
SHOWN = {"volcano": 0, "teacher": 4, "bicycle": 8}  # places among those held out: of 12 answers, okd demo shows these
SUBJECTS = {
    "In one sentence, what is a {}?": """
        volcano, river, mountain, desert, forest, island, lake, glacier, valley, waterfall, swamp, beach, cave,
        canyon, planet, star, comet, galaxy, moon, hurricane, tornado, flood, drought, thunderstorm, rainbow,
        cloud, shadow, mirror, magnet, battery, robot, computer, keyboard, program, website, password, computer
        virus, database, spreadsheet, poem, novel, fairy tale, biography, newspaper, dictionary, diary, letter,
        recipe, map, calendar, triangle, circle, square, prime number, fraction, percentage, graph, cell, virus,
        bacterium, fossil, dinosaur, mammal, reptile, bird, fish, insect, flower, tree, seed, root, leaf,
        mushroom, cactus, fruit, vegetable, spice, sandwich, soup, salad, pizza, cake, cookie, pancake, museum,
        library, hospital, school, university, restaurant, hotel, airport, harbor, bridge, tunnel, castle,
        temple, stadium, theater, farm, factory, bank, market, garden, park, zoo, village, city, country,
        continent, island nation, democracy, king, president, law, tax, vote, contract, company, budget, loan,
        friend, neighbor, family, holiday, birthday, wedding, festival, parade, game, puzzle, toy, sport, song,
        orchestra, choir, painting, sculpture, photograph, movie, cartoon, dance, costume, metaphor, verb, noun,
        adjective, sentence, paragraph, question, joke, proverb, habit, dream, goal, promise, secret""",
    "In one sentence, what is {}?": """
        gravity, electricity, energy, heat, light, sound, water, air, oxygen, carbon dioxide, gold, iron, salt,
        sugar, glass, plastic, paper, wood, cotton, wool, concrete, photosynthesis, evaporation, erosion,
        pollution, recycling, climate change, weather, evolution, digestion, respiration, sleep, memory,
        learning, intelligence, artificial intelligence, machine learning, the internet, email, software,
        programming, mathematics, geometry, algebra, statistics, physics, chemistry, biology, geography,
        history, psychology, economics, philosophy, medicine, engineering, architecture, agriculture, music,
        jazz, poetry, art, literature, grammar, inflation, trade, money, poverty, advertising, insurance,
        justice, freedom, peace, friendship, trust, courage, patience, kindness, honesty, curiosity, creativity,
        teamwork, leadership, respect, gratitude, happiness, fear, anger, stress, yoga, meditation, exercise,
        nutrition, vitamin C, protein, caffeine, chocolate, coffee, tea, milk, cheese, butter, honey, bread,
        rice, pasta, olive oil, vinegar, football, tennis, basketball, chess, swimming, hiking, gardening,
        cooking, fishing, photography, tourism, translation, journalism""",
    "In one sentence, what does a {} do?": """
        teacher, doctor, nurse, dentist, farmer, baker, butcher, cook, waiter, carpenter, plumber, electrician,
        painter, mechanic, engineer, architect, pilot, bus driver, sailor, firefighter, police officer, soldier,
        judge, lawyer, scientist, astronomer, biologist, chemist, historian, librarian, journalist, writer,
        poet, actor, musician, conductor, dancer, photographer, tailor, hairdresser, gardener, florist,
        fisherman, hunter, miner, cashier, manager, secretary, accountant, banker, programmer, web designer,
        translator, tour guide, coach, referee, veterinarian, pharmacist, psychologist, surgeon, midwife, mayor,
        ambassador, detective, locksmith, beekeeper, potter, blacksmith, jeweler, clockmaker""",
    "In one sentence, what is a {} used for?": """
        bicycle, hammer, screwdriver, saw, drill, ladder, shovel, rake, bucket, rope, knife, fork, spoon, plate,
        cup, kettle, oven, refrigerator, freezer, microwave, blender, dishwasher, washing machine, vacuum
        cleaner, broom, sponge, towel, pillow, blanket, lamp, candle, match, umbrella, raincoat, hat, scarf,
        glove, shoe, belt, button, zipper, needle, pair of scissors, ruler, pencil, eraser, notebook, backpack,
        suitcase, wallet, key, lock, clock, compass, telescope, microscope, thermometer, camera, telephone,
        radio, television, printer, calculator, flashlight, car, bus, train, airplane, helicopter, boat,
        submarine, truck, tractor, motorcycle, helmet, tent, sleeping bag, guitar, piano, drum, violin, flute,
        whistle, bell, tooth brush, comb, bandage, wheelchair, stethoscope, syringe, satellite, rocket,
        parachute, anchor, fence, chimney, window, door, roof, elevator, traffic light""",
    "Describe a {} in one sentence.": """
        cat, dog, horse, cow, pig, sheep, goat, chicken, duck, goose, rabbit, mouse, squirrel, fox, wolf, bear,
        lion, tiger, elephant, giraffe, zebra, monkey, gorilla, kangaroo, koala, panda, camel, donkey, deer,
        hedgehog, bat, eagle, owl, parrot, penguin, swan, sparrow, crow, shark, whale, dolphin, octopus, crab,
        jellyfish, salmon, turtle, snake, lizard, crocodile, frog, bee, butterfly, ant, spider, snail, worm,
        rose, sunflower, oak tree, palm tree, apple, banana, strawberry, lemon, pineapple, watermelon, carrot,
        potato, tomato, onion, pumpkin, sunset, snowflake, campfire, lighthouse, old book, busy street, quiet
        room, rainy day, winter morning, summer evening, birthday party""",
    "In one sentence, why do people {}?": """
        sleep, dream, laugh, cry, smile, sing, dance, read books, write letters, travel, go to school, learn
        languages, vote, pay taxes, save money, drink water, eat vegetables, wash their hands, brush their
        teeth, exercise, ride bicycles, keep pets, plant trees, recycle, celebrate birthdays, give gifts, tell
        stories, listen to music, play games, watch movies, take photographs, wear glasses, wear uniforms, use
        maps, live in cities, build houses, visit museums, climb mountains, go camping, swim in the sea, cook at
        home, share food, help each other, apologize, ask questions""",
    "In one sentence, what is {} known for?": """
        France, Italy, Spain, Germany, England, Ireland, Norway, Sweden, Switzerland, Greece, Russia, Turkey,
        Egypt, Morocco, Kenya, South Africa, India, China, Japan, Korea, Thailand, Australia, New Zealand,
        Canada, Mexico, Brazil, Argentina, Peru, Paris, London, Rome, Venice, New York, Tokyo, Albert Einstein,
        Isaac Newton, Marie Curie, Leonardo da Vinci, William Shakespeare, Mozart, Charles Darwin, Galileo
        Galilei, Thomas Edison, Mahatma Gandhi, Nelson Mandela""",
}


def questions() -> list[tuple[str, str]]:
    """(subject, question) in a fixed random order, but for those that are shown."""
    found = {
        subject: re.sub(r"\ba ([aeio]|umb)", r"an \1", template.format(subject))
        for template, subjects in SUBJECTS.items()
        for subject in (" ".join(word.split()) for word in subjects.split(","))
    }
    rest = [s for s in found if s not in SHOWN]
    random.Random(0).shuffle(rest)
    for subject, place in SHOWN.items():
        rest.insert(place, subject)
    return [(s, found[s]) for s in rest]


def main() -> None:
    model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    examples = [{"id": s, "prompt": q, "completion": "."} for s, q in questions()]
    rows = encode(examples, tokenizer, max_length=256).rows
    answers = generate_answers(model, tokenizer, rows, max_new_tokens=LONGEST, batch_size=32, progress=False)
    asked = dict(questions())
    kept = [
        {"id": a["id"], "prompt": asked[a["id"]], "completion": a["answer"].strip()}
        for a in answers
        if len(a["response"]) < LONGEST and len(a["answer"]) > 20
    ]
    folder = Path(__file__).parent.parent / "okd" / "questions"
    for name, part in (("held_out", kept[:HELD_OUT]), ("train", kept[HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
        print(f"{name}: {len(part)} of {len(asked)} questions")


if __name__ == "__main__":
    main()
