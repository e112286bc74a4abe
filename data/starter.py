"""The starter set: word problems with an answer, a worked solution and a strategy, all written by this file.

What it is: data to start from. train.py falls back on it when a real model is given without --data, so that a first
run needs no download. One small function a family draws the operands, writes the text and works the solution; every
number in a solution is computed from the operands, none is typed.
What it is not: a benchmark. The problems are easy to middling (from one step to a competition's first questions), the
wording comes from a few templates a family, and a high score here says little about other problems.

Three files: train.jsonl and test.jsonl hold the same families with different operands; heldout.jsonl holds two families
that training never sees. A strategy names the approach and is the same whatever the operands, so it leaks no answer.

Run it, from the repository root (writes the committed files again, byte for byte):

    python data/starter.py --out data/starter --seed 0
"""

import argparse
import json
import math
import random
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

TRAIN_ROWS = 20  # rows a family in train.jsonl
TEST_ROWS = 4  # rows a family in test.jsonl, drawn after the train rows and with operands of their own
HELDOUT_ROWS = 25  # rows a held-out family
MAX_DRAWS = 20_000  # a family that needs more has too few operands to choose from

# What a family gives: (operands, problem, answer, solution, strategy), or None where the drawn operands do not suit and
# the caller has to draw again.
Item = tuple[tuple, str, str, str, dict]
Family = Callable[[random.Random], Item | None]

# name, subject pronoun, possessive
NAMES = (
    ("Maya", "she", "her"), ("Omar", "he", "his"), ("Lena", "she", "her"), ("Tomas", "he", "his"),
    ("Priya", "she", "her"), ("Kwame", "he", "his"), ("Ingrid", "she", "her"), ("Diego", "he", "his"),
    ("Aiko", "she", "her"), ("Felix", "he", "his"), ("Zara", "she", "her"), ("Pavel", "he", "his"),
    ("Nadia", "she", "her"), ("Samuel", "he", "his"), ("Chloe", "she", "her"), ("Hassan", "he", "his"),
    ("Elif", "she", "her"), ("Jonas", "he", "his"), ("Rosa", "she", "her"), ("Victor", "he", "his"),
)
THINGS = ("marbles", "stickers", "postcards", "seashells", "buttons", "beads", "stamps", "badges", "pebbles",
          "trading cards")


# -------------------------------------------------------------------------------------------------------------- helpers


def plan(kind: str, idea: str, *steps: str) -> dict:
    """The strategy of a row: {"type", "strategy", "steps"}."""
    return {"type": kind, "strategy": idea, "steps": list(steps)}


def made(operands: tuple, problem: str, answer: object, lines: tuple, strategy: dict) -> Item:
    """Put an item together: the solution is the lines, then the boxed answer."""
    return operands, problem, str(answer), "\n".join((*lines, f"The answer is \\boxed{{{answer}}}")), strategy


def money(cents: int) -> str:
    """Cents as dollars with two decimals: 250 -> "2.50"."""
    return f"{cents // 100}.{cents % 100:02d}"


def tex(value: Fraction) -> str:
    """A fraction as the answer is written: "7" or "\\frac{7}{3}"."""
    return str(value.numerator) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def over(a: int, b: int) -> str:
    """The quotient for a solution line: "13/2", or "12/8 = 3/2" where it can be reduced."""
    return f"{a}/{b}" if math.gcd(a, b) == 1 and b > 1 else f"{a}/{b} = {Fraction(a, b)}"


def primes(n: int) -> dict[int, int]:
    """The prime factorisation of n as {prime: exponent}."""
    powers, p = {}, 2
    while n > 1:
        while n % p == 0:
            powers[p] = powers.get(p, 0) + 1
            n //= p
        p += 1
    return powers


def power_text(powers: dict[int, int]) -> str:
    """{2: 3, 5: 1} -> "2^3 * 5"; the empty product is "1"."""
    return " * ".join(f"{p}^{e}" if e > 1 else str(p) for p, e in powers.items()) or "1"


def signed(terms: tuple[tuple[int, str], ...]) -> str:
    """A sum of (coefficient, symbol), zero terms left out: ((1, "x^2"), (-3, "x"), (2, "")) -> "x^2 - 3x + 2"."""
    text = ""
    for coefficient, symbol in terms:
        if coefficient == 0:
            continue
        size = symbol if abs(coefficient) == 1 and symbol else f"{abs(coefficient)}{symbol}"
        sign = "-" if coefficient < 0 else "+"
        text += f" {sign} {size}" if text else ("-" if coefficient < 0 else "") + size
    return text or "0"


# --------------------------------------------------------------------------------- arithmetic, money, percent, averages


def one_step(rng: random.Random) -> Item:
    """One operation, found in the story."""
    (a_name, she, _), (b_name, _, _) = rng.sample(NAMES, 2)
    thing, op = rng.choice(THINGS), rng.choice("+-*/")
    if op == "+":
        a, b = rng.randint(14, 480), rng.randint(14, 480)
        answer, idea = a + b, "Two amounts are put together, so the total is their sum."
        step, texts = "Add the two amounts.", (
            f"{a_name} has {a} {thing} and {b_name} has {b} {thing}. How many {thing} do they have together?",
            f"A museum had {a} visitors in the morning and {b} visitors in the afternoon. How many visitors came that "
            "day?")
    elif op == "-":
        a = rng.randint(60, 600)
        b = rng.randint(15, a - 12)
        answer, idea = a - b, "An amount is taken away from a larger one, so what remains is the difference."
        step, texts = "Subtract the amount that is taken away from the amount at the start.", (
            f"{a_name} had {a} {thing} and gave {b} of them to {b_name}. How many {thing} does {a_name} have left?",
            f"A baker made {a} rolls and sold {b} of them by noon. How many rolls were left?")
    elif op == "*":
        a, b = rng.randint(6, 28), rng.randint(6, 40)
        answer, idea = a * b, "The story has equal groups, so the total is a product."
        step, texts = "Multiply the number of groups by the size of a group.", (
            f"{a_name} fills {a} boxes with {b} {thing} each. How many {thing} does {she} put into the boxes?",
            f"A theater has {a} rows with {b} seats in each row. How many seats does the theater have?")
    else:
        b, answer = rng.randint(3, 16), rng.randint(6, 45)
        a, idea = b * answer, "An amount is split into equal groups, so a quotient is asked for."
        step, texts = "Divide the whole amount by the number that describes the split.", (
            f"{a_name} shares {a} {thing} equally among {b} friends. How many {thing} does each friend get?",
            f"A gardener has {a} bulbs and plants {b} bulbs in each pot. How many pots does the gardener need?")
    strategy = plan("one-step word problem", idea, "Find the known amounts and what is asked for.", step)
    return made((a, b), rng.choice(texts), answer, (f"The story asks for {a} {op} {b} = {answer}.",), strategy)


def change(rng: random.Random) -> Item:
    """Two purchases, paid with one bill; the answer has cents."""
    name, she, _ = rng.choice(NAMES)
    x, y = rng.choice((("notebooks", "pens"), ("muffins", "cookies"), ("mugs", "spoons"), ("melons", "lemons"),
                       ("sandwiches", "apples")))
    n, m = rng.sample(range(2, 8), 2)
    p, q = 5 * rng.randint(36, 99), 5 * rng.randint(9, 34)
    total = n * p + m * q
    bill = next(b for b in (20, 50, 100) if 100 * b > total)
    text = rng.choice((
        f"{name} buys {n} {x} at ${money(p)} each and {m} {y} at ${money(q)} each. {she.capitalize()} pays with a "
        f"${bill} bill. How many dollars does {she} get back?",
        f"At a market, {x} cost ${money(p)} each and {y} cost ${money(q)} each. {name} takes {n} {x} and {m} {y} and "
        f"pays with a ${bill} bill. What is the change in dollars?"))
    answer = money(100 * bill - total)
    lines = (f"The {x} cost {n} * {money(p)} = {money(n * p)} dollars and the {y} cost {m} * {money(q)} = "
             f"{money(m * q)} dollars.",
             f"Together that is {money(n * p)} + {money(m * q)} = {money(total)} dollars.",
             f"The change is {bill} - {money(total)} = {answer} dollars.")
    if rng.random() < 0.5:
        strategy = plan("total cost and change",
                        "Find the cost of each kind of item, add the costs and subtract the total from the money paid.",
                        "Multiply each price by the number of items bought at that price.",
                        "Add the costs.", "Subtract the sum from the amount paid.")
    else:
        lines = (lines[0], f"After the {x}, {bill} - {money(n * p)} = {money(100 * bill - n * p)} dollars are left.",
                 f"After the {y}, {money(100 * bill - n * p)} - {money(m * q)} = {answer} dollars are left.")
        strategy = plan("total cost and change",
                        "Start from the money paid and take off the cost of one kind of item after the other.",
                        "Multiply each price by the number of items bought at that price.",
                        "Subtract the first cost from the money paid.", "Subtract the next cost from what is left.")
    return made((n, money(p), m, money(q), bill), text, answer, lines, strategy)


def packs(rng: random.Random) -> Item:
    """Equal packs, some set aside, the rest shared."""
    name, she, _ = rng.choice(NAMES)
    n, k, shares = rng.randint(4, 18), rng.randint(8, 40), rng.randint(3, 14)
    total = n * k
    each = rng.randint(total // (2 * shares), (total - 2) // shares)  # at least two are set aside
    aside = total - shares * each
    text = rng.choice((
        f"A farm fills {n} crates with {k} melons each. Then {aside} melons turn out to be damaged and are thrown "
        f"away, and the rest are shared equally among {shares} shops. How many melons does each shop get?",
        f"{name} opens {n} packs of {k} stickers each. {she.capitalize()} keeps {aside} stickers and hands out the "
        f"rest equally to {shares} children. How many stickers does each child get?",
        f"A school orders {n} boxes of {k} pencils each. It stores {aside} of the pencils and divides the others "
        f"equally among {shares} classes. How many pencils does each class receive?"))
    lines = (f"There are {n} * {k} = {total} in all.", f"Of these, {total} - {aside} = {total - aside} are shared.",
             f"Each share is {total - aside} / {shares} = {each}.")
    strategy = plan("multi-step arithmetic word problem",
                    "Follow the story in order: build the total, remove what is set aside, split the rest.",
                    "Multiply the number of packs by the size of a pack.",
                    "Subtract the amount that is not shared.", "Divide what is left by the number of shares.")
    return made((n, k, aside, shares), text, each, lines, strategy)


def unit_rate(rng: random.Random) -> Item:
    """A constant rate, by the unit or by a scale factor."""
    name = rng.choice(NAMES)[0]
    b = rng.randint(3, 12)
    by_unit = rng.random() < 0.5
    if by_unit:
        rate = rng.randint(12, 48)
        a, c = rate * b, b + rng.randint(1, 15)
        answer = rate * c
        lines = (f"In one minute that is {a} / {b} = {rate}.", f"In {c} minutes it is {rate} * {c} = {answer}.")
        strategy = plan("constant rate", "Find how much belongs to one unit of time, then scale up.",
                        "Divide the amount by the time it takes.", "Multiply the amount for one unit by the new time.")
    else:
        times, a = rng.randint(2, 9), b * rng.randint(12, 30) + rng.randint(1, b - 1)
        c = times * b
        answer = times * a
        lines = (f"The time grows by the factor {c} / {b} = {times}.",
                 f"The amount grows by the same factor: {a} * {times} = {answer}.")
        strategy = plan("constant rate", "At a constant rate, amount and time grow by the same factor.",
                        "Divide the new time by the old time to get the factor.",
                        "Multiply the old amount by the factor.")
    text = rng.choice((
        f"A machine fills {a} bottles in {b} minutes. At the same rate, how many bottles does it fill in {c} minutes?",
        f"{name} types {a} words in {b} minutes. At this speed, how many words does {name} type in {c} minutes?",
        f"A pump moves {a} liters of water in {b} minutes. If it keeps working at this rate, how many liters does it "
        f"move in {c} minutes?"))
    return made((a, b, c), text, answer, lines, strategy)


def percent_rest(rng: random.Random) -> Item:
    """A percentage of a whole, and what remains."""
    p = 5 * rng.randint(2, 18)
    n = 20 * rng.randint(3, 45)
    part = n * p // 100
    rest = n - part
    text = rng.choice((
        f"A school has {n} students, and {p}% of them come by bus. How many students do not come by bus?",
        f"A library owns {n} books, and {p}% of them are novels. How many of the books are not novels?",
        f"An orchard has {n} trees. If {p}% of them are apple trees, how many of the trees are not apple trees?"))
    if rng.random() < 0.5:
        lines = (f"The part is {n} * {p} / 100 = {part}.", f"The rest is {n} - {part} = {rest}.")
        strategy = plan("percentage of a quantity", "Compute the named part and subtract it from the whole.",
                        "Multiply the whole by the percentage and divide by a hundred.",
                        "Subtract the part from the whole.")
    else:
        lines = (f"The rest is 100 - {p} = {100 - p} percent of the whole.", f"That is {n} * {100 - p} / 100 = {rest}.")
        strategy = plan("percentage of a quantity",
                        "Turn the question into a percentage of the whole before computing.",
                        "Subtract the given percentage from a hundred percent.",
                        "Take that percentage of the whole.")
    return made((n, p), text, rest, lines, strategy)


def reverse_percent(rng: random.Random) -> Item:
    """The amount before a percentage change."""
    name = rng.choice(NAMES)[0]
    p, old = 5 * rng.randint(1, 8), 20 * rng.randint(6, 60)
    up = rng.random() < 0.6
    share = 100 + p if up else 100 - p
    new = old * share // 100
    if up:
        text = rng.choice((
            f"After a raise of {p}%, {name} earns ${new} a week. How many dollars a week did {name} earn before the "
            "raise?",
            f"This year {new} runners entered a race, which is {p}% more than last year. How many runners entered "
            "last year?"))
    else:
        text = rng.choice((
            f"After a price cut of {p}%, a bicycle costs ${new}. How many dollars did it cost before the cut?",
            f"The number of birds on an island has fallen by {p}% to {new}. How many birds were there before?"))
    word = "+" if up else "-"
    if rng.random() < 0.5:
        factor = f"{share / 100:g}"
        lines = (f"The old amount was multiplied by 1 {word} {p} / 100 = {factor}.",
                 f"So the old amount is {new} / {factor} = {old}.")
        strategy = plan("percentage change, original value unknown",
                        "Write the change as a factor on the original value and undo it by division.",
                        "Write the factor as one plus or minus the percentage as a decimal.",
                        "Divide the final value by the factor.")
    else:
        lines = (f"The amount now is 100 {word} {p} = {share} percent of the old amount.",
                 f"One percent is {new} / {share}, so the old amount is {new} / {share} * 100 = {old}.")
        strategy = plan("percentage change, original value unknown",
                        "Treat the original value as a hundred percent and go through one percent.",
                        "Find which percentage of the original the final value is.",
                        "Divide the final value by that percentage to get one percent.", "Multiply by a hundred.")
    return made((p, new), text, old, lines, strategy)


def average_needed(rng: random.Random) -> Item:
    """The next value that brings an average up."""
    name, she, _ = rng.choice(NAMES)
    k, mean = rng.randint(3, 7), rng.randint(62, 88)
    target = mean + rng.randint(1, min(4, (99 - mean) // (k + 1) + 1))
    answer = target * (k + 1) - mean * k
    text = rng.choice((
        f"The average of {name}'s first {k} quiz scores is {mean}. What score does {name} need on the next quiz to "
        f"bring the average up to {target}?",
        f"In {k} rounds of a game {name} scored {mean} points on average. How many points must {she} score in the "
        f"next round so that the average over all rounds becomes {target}?"))
    if rng.random() < 0.5:
        lines = (f"So far the total is {k} * {mean} = {k * mean}.",
                 f"The total needed is {k + 1} * {target} = {(k + 1) * target}.",
                 f"The next value is {(k + 1) * target} - {k * mean} = {answer}.")
        strategy = plan("average with a missing value", "Compare totals instead of averages.",
                        "Multiply the present average by the number of values to get the present total.",
                        "Multiply the wanted average by the new number of values to get the needed total.",
                        "Subtract the present total from the needed total.")
    else:
        gap = target - mean
        lines = (f"Each earlier value is short of the new average by {target} - {mean} = {gap} on average.",
                 f"The next value must make up {k} * {gap} = {k * gap}.", f"So it is {target} + {k * gap} = {answer}.")
        strategy = plan("average with a missing value",
                        "The new value must lie above the wanted average by as much as the earlier "
                        "values fall short of it together.", "Find by how much the average has to rise.",
                        "Multiply the rise by the number of earlier values.", "Add the result to the wanted average.")
    return made((k, mean, target), text, answer, lines, strategy)


def unit_conversion(rng: random.Random) -> Item | None:
    """A large unit, cut into pieces of a small unit."""
    text, factor, small = rng.choice((
        ("A rope {a} meters long is cut into pieces of {b} centimeters each. How many pieces are there?", 100,
         "centimeters"),
        ("A barrel holds {a} liters of juice. How many bottles of {b} milliliters can be filled from it?", 1000,
         "milliliters"),
        ("A radio station plays short programs of {b} minutes each, one after the other, for {a} hours. How many "
         "programs does it play?", 60, "minutes"),
        ("A sack contains {a} kilograms of rice. How many portions of {b} grams does it give?", 1000, "grams"),
        ("A road crew puts a lamp post at the end of every {b} meters of a new road that is {a} kilometers long. How "
         "many lamp posts does it need?", 1000, "meters")))
    tenths = 5 * rng.randint(3, 48)  # halves of the large unit
    total = tenths * factor // 10
    sizes = [d for d in range(factor // 20, factor) if total % d == 0 and 6 <= total // d <= 90]
    sizes = [d for d in sizes if d % 5 == 0 or d < 20]  # round sizes
    if not sizes:
        return None
    a, b = f"{tenths / 10:g}", rng.choice(sizes)
    lines = (f"In {small}, the whole is {a} * {factor} = {total}.",
             f"The number asked for is {total} / {b} = {total // b}.")
    strategy = plan("unit conversion and division", "Bring both quantities to the same unit, then divide.",
                    "Convert the larger unit into the smaller one.", "Divide the whole by the size of a piece.")
    return made((a, b), text.format(a=a, b=b), total // b, lines, strategy)


def ratio_share(rng: random.Random) -> Item | None:
    """A total, split in a given ratio."""
    (x, _, _), (y, _, _) = rng.sample(NAMES, 2)
    a, b = rng.sample(range(2, 12), 2)
    if math.gcd(a, b) > 1:
        return None
    part = rng.randint(3, 24)
    total, answer = part * (a + b), part * a
    text = rng.choice((
        f"{x} and {y} share ${total} in the ratio {a}:{b}, in this order. How many dollars does {x} get?",
        f"Blue and yellow paint are mixed in the ratio {a}:{b} to make {total} liters of green paint. How many liters "
        f"of blue paint are used?",
        f"The ratio of adults to children at a fair is {a}:{b}. There are {total} people at the fair. How many of "
        "them are adults?"))
    if rng.random() < 0.5:
        lines = (f"There are {a} + {b} = {a + b} equal parts.", f"One part is {total} / {a + b} = {part}.",
                 f"So {a} parts are {a} * {part} = {answer}.")
        strategy = plan("sharing in a ratio", "Split the total into as many equal parts as the ratio has.",
                        "Add the numbers of the ratio.", "Divide the total by this sum to get one part.",
                        "Multiply one part by the number of parts asked for.")
    else:
        lines = (f"The first share is {a}/{a + b} of the total.", f"That is {a} * {total} / {a + b} = {answer}.")
        strategy = plan("sharing in a ratio", "Turn the ratio into a fraction of the total.",
                        "Write the wanted share as a fraction: its ratio number over the sum of the ratio numbers.",
                        "Multiply the total by this fraction.")
    return made((a, b, total), text, answer, lines, strategy)


def fraction_left(rng: random.Random) -> Item:
    """A fraction of the whole, then a fraction of the remainder."""
    name, she, her = rng.choice(NAMES)
    shares = ((1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (1, 5), (2, 5), (3, 5), (1, 6), (5, 6), (3, 8))
    (a, b), (c, d) = rng.sample(shares, 2)
    total = b * d * rng.randint(3, 24)
    rest = total * (b - a) // b
    left = rest * (d - c) // d
    text = rng.choice((
        f"A book has {total} pages. {name} reads {a}/{b} of the book on Saturday and {c}/{d} of the remaining pages "
        f"on Sunday. How many pages are still unread?",
        f"{name} has ${total}. {she.capitalize()} spends {a}/{b} of {her} money on a coat and {c}/{d} of what is left "
        f"on shoes. How many dollars does {she} have in the end?",
        f"A tank holds {total} liters of water. In the morning {a}/{b} of the water is used, and in the evening "
        f"{c}/{d} of the remaining water. How many liters are left?"))
    if rng.random() < 0.5:
        lines = (f"The first use takes {total} * {a} / {b} = {total - rest}, so {total} - {total - rest} = {rest} "
                 "remain.",
                 f"The second use takes {rest} * {c} / {d} = {rest - left}, so {rest} - {rest - left} = {left} remain.")
        strategy = plan("fraction of a remainder", "Work through the story in order and keep track of what remains.",
                        "Take the first fraction of the whole and subtract it.",
                        "Take the second fraction of the remainder, not of the whole, and subtract it.")
    else:
        both = Fraction(b - a, b) * Fraction(d - c, d)
        lines = (f"First 1 - {a}/{b} = {b - a}/{b} of the whole remains, then 1 - {c}/{d} = {d - c}/{d} of that.",
                 f"Together {b - a}/{b} * {d - c}/{d} = {both} of the whole remains.",
                 f"That is {total} * {both} = {left}.")
        strategy = plan("fraction of a remainder", "Multiply the fractions that remain after each step.",
                        "Subtract each used fraction from one whole.", "Multiply the remaining fractions.",
                        "Multiply the starting amount by the product.")
    return made((total, a, b, c, d), text, left, lines, strategy)


def discount_tax(rng: random.Random) -> Item:
    """A discount and then a tax, to the cent."""
    thing = rng.choice(("jacket", "tent", "lamp", "backpack", "blender", "guitar", "chair"))
    price, off, tax = 20 * rng.randint(2, 20), 5 * rng.randint(2, 9), rng.randint(4, 12)
    sale = price * (100 - off)  # cents
    final = sale * (100 + tax) // 100  # exact: price is a multiple of 20 and the discount a multiple of 5
    text = rng.choice((
        f"A {thing} with a price of ${price} is on sale at {off}% off. A sales tax of {tax}% is added to the sale "
        f"price. How many dollars does the {thing} cost in the end?",
        f"A shop takes {off}% off the price of a {thing} marked ${price}, and then adds {tax}% tax to the reduced "
        f"price. What is the final price in dollars?"))
    if rng.random() < 0.5:
        lines = (f"The discount is {price} * {off} / 100 = {money(price * off)} dollars.",
                 f"The sale price is {price} - {money(price * off)} = {money(sale)} dollars.",
                 f"The tax is {money(sale)} * {tax} / 100 = {money(final - sale)} dollars.",
                 f"The final price is {money(sale)} + {money(final - sale)} = {money(final)} dollars.")
        strategy = plan("discount followed by tax",
                        "Compute the discount and the tax one after the other, each on its own base.",
                        "Take the discount off the marked price.", "Compute the tax on the reduced price.",
                        "Add the tax to the reduced price.")
    else:
        keep, grow = f"{(100 - off) / 100:g}", f"{(100 + tax) / 100:g}"
        lines = (f"The discount multiplies the price by 1 - {off} / 100 = {keep}, the tax by 1 + {tax} / 100 = {grow}.",
                 f"After the discount the price is {price} * {keep} = {money(sale)} dollars.",
                 f"With tax it is {money(sale)} * {grow} = {money(final)} dollars.")
        strategy = plan("discount followed by tax", "Write each percentage change as a factor and multiply.",
                        "Write the discount as a factor below one and the tax as a factor above one.",
                        "Multiply the marked price by the discount factor.", "Multiply the result by the tax factor.")
    return made((price, off, tax), text, money(final), lines, strategy)


def profit(rng: random.Random) -> Item:
    """Profit or loss: as a percentage of the cost, or in dollars after breakage."""
    name, she, _ = rng.choice(NAMES)
    thing = rng.choice(("bicycle", "camera", "painting", "sofa", "violin", "desk"))
    if rng.random() < 0.6:
        cost, p = 20 * rng.randint(2, 30), 5 * rng.randint(1, 12)
        gain = rng.random() < 0.6
        delta = cost * p // 100
        sold = cost + delta if gain else cost - delta
        word, line = ("profit", f"{sold} - {cost}") if gain else ("loss", f"{cost} - {sold}")
        text = rng.choice((
            f"{name} buys a {thing} for ${cost} and sells it for ${sold}. What percent of the cost is the {word}?",
            f"A dealer paid ${cost} for a {thing} and sold it for ${sold}. Find the {word} as a percentage of what "
            "the dealer paid."))
        lines = (f"The {word} is {line} = {delta} dollars.",
                 f"As a percentage of the cost this is {delta} / {cost} * 100 = {p}.")
        strategy = plan("profit or loss in percent",
                        "Compare the difference between selling price and cost with the cost.",
                        "Subtract the smaller of the two prices from the larger.", "Divide the difference by the cost.",
                        "Multiply by a hundred to get a percentage.")
        return made((cost, sold), text, p, lines, strategy)
    n, price = rng.randint(20, 60), rng.randint(4, 15)
    broken = rng.randint(2, 6)
    income = (n - broken) * price
    cost = rng.randint(income // 2, income - 10)
    text = rng.choice((
        f"{name} buys {n} vases for ${cost} in all. On the way {broken} of them break, and {she} sells each of the "
        f"others for ${price}. How many dollars of profit does {she} make?",
        f"A stall owner pays ${cost} for {n} lanterns. It turns out that {broken} of them do not work, and the others "
        f"are sold for ${price} each. What is the stall owner's profit in dollars?"))
    lines = (f"The number sold is {n} - {broken} = {n - broken}.",
             f"They bring in {n - broken} * {price} = {income} dollars.",
             f"The profit is {income} - {cost} = {income - cost} dollars.")
    strategy = plan("profit in money", "Profit is income minus cost.", "Find how many items are really sold.",
                    "Multiply by the selling price to get the income.",
                    "Subtract the whole cost, unsold items included.")
    return made((n, cost, broken, price), text, income - cost, lines, strategy)


# --------------------------------------------------------------------------------------------------- equations in words


def linear_undo(rng: random.Random) -> Item:
    """a * x + b = c with a whole x."""
    name = rng.choice(NAMES)[0]
    a, b, x = rng.randint(3, 15), rng.randint(4, 60), rng.randint(3, 30)
    c = a * x + b
    text = rng.choice((
        f"{name} thinks of a number, multiplies it by {a}, adds {b} and gets {c}. What is the number?",
        f"When a number is multiplied by {a} and the product is increased by {b}, the result is {c}. Find the number.",
        f"A workshop charges ${a} for each hour of work plus a fixed fee of ${b}. {name} pays ${c}. How many hours "
        f"did the work take?"))
    if rng.random() < 0.5:
        lines = (f"Before {b} was added there were {c} - {b} = {c - b}.",
                 f"Before the multiplication there were {c - b} / {a} = {x}.")
        strategy = plan("linear equation in words", "Undo the operations in the opposite order.",
                        "Start from the result and subtract what was added.",
                        "Divide by the number that was multiplied with.")
    else:
        lines = (f"Let x be the number asked for. Then {a}x + {b} = {c}.", f"So {a}x is {c} - {b} = {c - b}.",
                 f"And x is {c - b} / {a} = {x}.")
        strategy = plan("linear equation in words",
                        "Name the unknown, translate the text into an equation and solve it.",
                        "Call the unknown number x and write the equation.", "Move the constant to the other side.",
                        "Divide by the coefficient of x.")
    return made((a, b, c), text, x, lines, strategy)


def linear_both_sides(rng: random.Random) -> Item:
    """b + a * x = d + c * x; x is often a fraction."""
    a, c = rng.sample(range(2, 15), 2)
    a, c = max(a, c), min(a, c)
    b = rng.randint(2, 30)
    d = b + rng.randint(3, 40)
    x = Fraction(d - b, a - c)
    text = rng.choice((
        f"The sum of {b} and {a} times a number equals the sum of {d} and {c} times the same number. What is the "
        f"number? Give the exact value.",
        f"One tank holds {b} liters and gains {a} liters per minute. Another tank holds {d} liters and gains {c} "
        f"liters per minute. After how many minutes do they hold the same amount? Give the exact value.",
        f"Solve for x and give the exact value: {b} + {a}x = {d} + {c}x."))
    lines = (f"Let x be the unknown. Then {b} + {a}x = {d} + {c}x.",
             f"The terms with x differ by {a} - {c} = {a - c} times x.",
             f"The constants differ by {d} - {b} = {d - b}.", f"So x is {over(d - b, a - c)}.")
    strategy = plan("linear equation with the unknown on both sides",
                    "Collect the unknown on one side and the constants on the other.",
                    "Translate the text into an equation in x.",
                    "Subtract the smaller x term from both sides.",
                    "Subtract the constant that stands next to x from both sides.", "Divide and reduce the fraction.")
    return made((b, a, d, c), text, tex(x), lines, strategy)


def consecutive(rng: random.Random) -> Item:
    """The sum of k consecutive (even, odd) integers."""
    kind, step = rng.choice((("integers", 1), ("even integers", 2), ("odd integers", 2)))
    by_mean = rng.random() < 0.5
    k = rng.choice((3, 5, 7)) if by_mean else rng.choice((3, 4, 5, 6))
    first = rng.randint(4, 90)
    first += {"integers": 0, "even integers": first % 2, "odd integers": 1 - first % 2}[kind]
    last = first + step * (k - 1)
    total = k * (first + last) // 2
    word, answer = rng.choice((("smallest", first), ("largest", last)))
    text = rng.choice((
        f"The sum of {k} consecutive {kind} is {total}. What is the {word} of them?",
        f"If {k} consecutive {kind} add up to {total}, what is the {word} of these numbers?"))
    if by_mean:
        middle, reach = total // k, step * (k - 1) // 2
        lines = (f"The middle number is the average, {total} / {k} = {middle}.",
                 f"The {word} number is {step} * {(k - 1) // 2} = {reach} away.",
                 f"So it is {middle} {'-' if word == 'smallest' else '+'} {reach} = {answer}.")
        strategy = plan("consecutive integers with a given sum",
                        "The average of an odd count of evenly spaced numbers is the middle one.",
                        "Divide the sum by the count to get the middle number.",
                        "Count the steps from the middle to the number asked for, with the right step size.",
                        "Move that far up or down from the middle.")
    else:
        extra = step * k * (k - 1) // 2
        lines = (f"Let x be the smallest number; the numbers are x up to x + {step * (k - 1)} in steps of {step}.",
                 f"Their sum is {k}x + {extra} = {total}.", f"So x is ({total} - {extra}) / {k} = {first}.")
        lines += () if word == "smallest" else (f"The largest number is {first} + {step * (k - 1)} = {last}.",)
        strategy = plan("consecutive integers with a given sum",
                        "Express all numbers by the smallest one and solve for it.",
                        "Call the smallest number x and write the others as x plus multiples of the step.",
                        "Add them up and set the sum equal to the given value.", "Solve for x.",
                        "Go from the smallest number to the one asked for.")
    return made((k, total), text, answer, lines, strategy)


def ages(rng: random.Random) -> Item:
    """Two people's ages, now and some years later."""
    (x, _, _), (y, _, _) = rng.sample(NAMES, 2)
    k, t, young = rng.randint(2, 4), rng.randint(3, 12), rng.randint(3, 14)
    if rng.random() < 0.5:
        older = (k - 1) * (young + t)
        text = rng.choice((
            f"{x} is {older} years older than {y}. In {t} years, {x} will be {k} times as old as {y}. How old is {y} "
            "now?",
            f"The difference between the ages of {x} and {y} is {older} years. In {t} years {x}, the older one, will "
            f"be {k} times as old as {y}. What is the present age of {y}?"))
        lines = (f"The difference stays {older} years. When one is {k} times as old as the other, it is {k} - 1 = "
                 f"{k - 1} times the younger age.", f"So {y} will then be {older} / {k - 1} = {young + t} years old.",
                 f"Now {y} is {young + t} - {t} = {young} years old.")
        strategy = plan("age problem",
                        "The difference between two ages never changes, so compare it with the multiple at the later "
                        "time.", "Write the difference as a multiple of the younger age at the later time.",
                        "Divide to get the younger age at that time.", "Go back to the present.")
        return made((older, t, k), text, young, lines, strategy)
    total = young * (k + 1) + 2 * t
    text = rng.choice((
        f"{x} is {k} times as old as {y}. In {t} years the sum of their ages will be {total}. How old is {x} now?",
        f"The age of {x} is {k} times the age of {y}. In {t} years their ages will add up to {total}. How many years "
        f"old is {x} today?"))
    lines = (f"Both grow older by {t} years, so now the ages add up to {total} - 2 * {t} = {total - 2 * t}.",
             f"That is {k} + 1 = {k + 1} times the age of {y}, who is {total - 2 * t} / {k + 1} = {young}.",
             f"So {x} is {k} * {young} = {k * young}.")
    strategy = plan("age problem", "Bring the sum of the ages back to the present and express it by the younger age.",
                    "Subtract the years that pass once for each person.",
                    "Write both present ages as multiples of the younger one.",
                    "Divide to get the younger age.", "Multiply to get the older age if it is asked for.")
    return made((k, t, total), text, k * young, lines, strategy)


def heads_legs(rng: random.Random) -> Item:
    """Two kinds of things, counted together in two ways."""
    small, few, large, many, setting, unit, part = rng.choice((
        ("chickens", 2, "rabbits", 4, "On a farm there are chickens and rabbits", "animals", "legs"),
        ("bicycles", 2, "tricycles", 3, "A shop repairs bicycles and tricycles", "of them", "wheels"),
        ("stools", 3, "chairs", 4, "A hall is furnished with three-legged stools and four-legged chairs", "seats",
         "legs"),
        ("ants", 6, "spiders", 8, "A glass box contains ants with six legs and spiders with eight legs", "animals",
         "legs")))
    a, b = rng.randint(5, 45), rng.randint(4, 40)
    n, total = a + b, few * a + many * b
    text = rng.choice((
        f"{setting}. There are {n} {unit}, and together they have {total} {part}. How many {large} are there?",
        f"{setting}. Someone counts {n} {unit} with {total} {part} in all. How many of them are {large}?"))
    if rng.random() < 0.5:
        lines = (f"If all were {small}, there would be {few} * {n} = {few * n} {part}.",
                 f"That is {total} - {few * n} = {total - few * n} too few.",
                 f"Each of the {large} adds {many} - {few} = {many - few}, so there are {total - few * n} / "
                 f"{many - few} = {b} {large}.")
        strategy = plan("two kinds, two totals",
                        "Pretend that everything is of the smaller kind and explain the missing parts.",
                        "Compute the parts if all were of the kind with fewer parts.",
                        "Subtract this from the real number of parts.",
                        "Divide by the extra parts that one of the other kind brings.")
    else:
        lines = (f"Let a be the number of {small} and b the number of {large}: a + b = {n} and {few}a + {many}b = "
                 f"{total}.",
                 f"Subtracting {few} times the first equation leaves {signed(((many - few, 'b'),))} = {total} - {few} "
                 f"* {n} = {total - few * n}.",
                 f"So b is {total - few * n} / {many - few} = {b}.")
        strategy = plan("two kinds, two totals",
                        "Write one equation for the count and one for the parts, and eliminate one unknown.",
                        "Name the two unknown counts and write both equations.",
                        "Multiply the count equation so that one unknown cancels when the equations are subtracted.",
                        "Solve for the unknown that is left.")
    return made((n, total), text, b, lines, strategy)


# ------------------------------------------------------------------------------------------------ work, motion and time


def work_together(rng: random.Random) -> Item:
    """Two workers, one job; the time is a fraction."""
    (x, _, _), (y, _, _) = rng.sample(NAMES, 2)
    a, b = sorted(rng.sample(range(2, 25), 2))
    time = Fraction(a * b, a + b)
    job = rng.choice(("paint a fence", "clean a warehouse", "pack an order", "weed a field"))
    text = rng.choice((
        f"Working alone, {x} needs {a} hours to {job} and {y} needs {b} hours. How many hours do they need if they "
        f"work together? Give the exact value.",
        f"One pump empties a pool in {a} hours and another pump empties it in {b} hours. How many hours does it take "
        f"with both pumps running? Give the exact value."))
    if rng.random() < 0.5:
        lines = (f"In one hour they do 1/{a} + 1/{b} = {Fraction(a + b, a * b)} of the job.",
                 f"The whole job takes 1 / ({Fraction(a + b, a * b)}) = {time} hours.")
        strategy = plan("combined work rates",
                        "Add the rates, that is, the fractions of the job done in one unit of time.",
                        "Write each rate as one over the time needed alone.", "Add the rates.",
                        "Take the reciprocal of the combined rate.")
    else:
        units = math.lcm(a, b)
        lines = (f"Let the job have {units} equal units, a common multiple of both times.",
                 f"In one hour they do {units} / {a} + {units} / {b} = {units // a + units // b} units.",
                 f"The whole job takes {over(units, units // a + units // b)} hours.")
        strategy = plan("combined work rates",
                        "Measure the job in units that both times divide, so that the rates are whole numbers.",
                        "Take a common multiple of the two times as the size of the job.",
                        "Find how many units each does in one unit of time, and add.",
                        "Divide the size of the job by the combined rate and reduce.")
    return made((a, b), text, tex(time), lines, strategy)


def two_legs(rng: random.Random) -> Item:
    """The average speed of a trip in two parts."""
    name = rng.choice(NAMES)[0]
    v, w = rng.sample(range(30, 100, 5), 2)
    s, t = rng.sample(range(1, 7), 2)
    d, e = v * s, w * t
    mean = Fraction(d + e, s + t)
    if rng.random() < 0.5:
        text = rng.choice((
            f"{name} drives {d} kilometers at {v} kilometers per hour and then {e} kilometers at {w} kilometers per "
            f"hour. What is {name}'s average speed for the whole trip, in kilometers per hour? Give the exact value.",
            f"A truck covers the first {d} miles of a trip at {v} miles per hour and the other {e} miles at {w} miles "
            f"per hour. Find its average speed over the trip in miles per hour, as an exact value."))
        lines = (f"The times are {d} / {v} = {s} and {e} / {w} = {t} hours, together {s} + {t} = {s + t} hours.",
                 f"The distance is {d} + {e} = {d + e}.", f"The average speed is {over(d + e, s + t)}.")
        strategy = plan("average speed over two legs",
                        "Average speed is total distance over total time, not the mean of the speeds.",
                        "Divide each distance by its speed to get the times.", "Add the distances and add the times.",
                        "Divide the total distance by the total time and reduce.")
        return made((d, v, e, w), text, tex(mean), lines, strategy)
    s_text, t_text = (f"{n} hour" + "s" * (n > 1) for n in (s, t))
    text = rng.choice((
        f"{name} drives for {s_text} at {v} kilometers per hour and then for {t_text} at {w} kilometers per hour. "
        f"What is the average speed of the whole trip in kilometers per hour? Give the exact value.",
        f"A train travels for {s_text} at {v} miles per hour and after that for {t_text} at {w} miles per hour. Find "
        f"its average speed in miles per hour, as an exact value."))
    lines = (f"The distances are {v} * {s} = {d} and {w} * {t} = {e}, together {d} + {e} = {d + e}.",
             f"The time is {s} + {t} = {s + t} hours.", f"The average speed is {over(d + e, s + t)}.")
    strategy = plan("average speed over two legs", "Weigh each speed by the time it was driven.",
                    "Multiply each speed by its time to get the distances.", "Add the distances and add the times.",
                    "Divide the total distance by the total time and reduce.")
    return made((s, v, t, w), text, tex(mean), lines, strategy)


def meet_or_chase(rng: random.Random) -> Item:
    """Two movers: towards each other, or one after the other."""
    (x, _, _), (y, _, _) = rng.sample(NAMES, 2)
    v, w = sorted(rng.sample(range(4, 30), 2))
    if rng.random() < 0.5:
        gap = rng.randint(20, 160)
        time = Fraction(gap, v + w)
        text = rng.choice((
            f"Two cyclists start at the same time from towns {gap} kilometers apart and ride towards each other, one "
            f"at {v} and the other at {w} kilometers per hour. After how many hours do they meet? Give the exact "
            "value.",
            f"{x} and {y} are {gap} kilometers apart and set off towards each other at the same moment. {x} moves at "
            f"{v} kilometers per hour and {y} at {w} kilometers per hour. How many hours pass until they meet? Give "
            "the exact value."))
        lines = (f"The distance shrinks by {v} + {w} = {v + w} kilometers per hour.",
                 f"They meet after {over(gap, v + w)} hours.")
        strategy = plan("two movers meeting",
                        "Movers that approach each other close the gap with the sum of their speeds.",
                        "Add the speeds.", "Divide the distance between them by this sum and reduce.")
        return made((gap, v, w), text, tex(time), lines, strategy)
    head = rng.randint(2, 6)
    time = Fraction(head * v, w - v)
    text = rng.choice((
        f"{x} rides out of a village at {v} kilometers per hour. {y} starts from the same village {head} hours later "
        f"and follows on the same road at {w} kilometers per hour. How many hours does {y} need to catch up with {x}? "
        "Give the exact value.",
        f"A slow boat sails from a harbor at {v} kilometers per hour. A fast boat starts {head} hours later on the "
        f"same course at {w} kilometers per hour. How many hours does the fast boat need to reach the slow one? Give "
        "the exact value."))
    lines = (f"The head start is {v} * {head} = {v * head} kilometers.",
             f"It shrinks by {w} - {v} = {w - v} kilometers per hour.",
             f"The time needed is {over(v * head, w - v)} hours.")
    strategy = plan("one mover catching up with another",
                    "The pursuer closes the head start with the difference of the speeds.",
                    "Multiply the slower speed by the head start in time to get the distance to close.",
                    "Subtract the slower speed from the faster one.",
                    "Divide the distance by the difference and reduce.")
    return made((v, head, w), text, tex(time), lines, strategy)


def elapsed_time(rng: random.Random) -> Item:
    """Minutes between a time before noon and a time after it."""
    name = rng.choice(NAMES)[0]
    start, end = 60 * rng.randint(6, 11) + rng.randint(1, 58), 60 * rng.randint(13, 20) + rng.randint(2, 59)
    (h, m), (g, n) = divmod(start, 60), divmod(end, 60)
    first, second = f"{h}:{m:02d} AM", f"{g - 12}:{n:02d} PM"
    text = rng.choice((
        f"A train leaves at {first} and arrives at {second} on the same day. How many minutes does the trip take?",
        f"{name} starts a hike at {first} and comes back at {second} on the same day. How many minutes does the hike "
        "last?",
        f"A market opens at {first} and closes at {second}. For how many minutes is it open?"))
    if rng.random() < 0.5:
        lines = (f"From midnight, the start is {h} * 60 + {m} = {start} minutes.",
                 f"The end is {g} * 60 + {n} = {end} minutes.",
                 f"The difference is {end} - {start} = {end - start} minutes.")
        strategy = plan("elapsed time", "Express both times in minutes after midnight and subtract.",
                        "Write afternoon hours on the full-day clock.",
                        "Multiply the hours by the minutes in an hour and add the minutes.",
                        "Subtract the start from the end.")
    else:
        lines = (f"From {first} to the next full hour it takes 60 - {m} = {60 - m} minutes.",
                 f"From then to {g - 12}:00 PM there are {g} - {h + 1} = {g - h - 1} full hours, that is {g - h - 1} "
                 f"* 60 = {(g - h - 1) * 60} minutes.",
                 f"Then {n} more minutes: {60 - m} + {(g - h - 1) * 60} + {n} = {end - start}.")
        strategy = plan("elapsed time", "Count up from the start through full hours to the end.",
                        "Count the minutes to the next full hour.",
                        "Count the full hours up to the last one before the end and turn them into minutes.",
                        "Add the minutes after the last full hour.")
    return made((h, m, g - 12, n), text, end - start, lines, strategy)


# --------------------------------------------------------------------------------------------- geometry and expressions


def rectangle_area(rng: random.Random) -> Item:
    """Perimeter and difference of the sides; the area is asked for."""
    width, more = rng.randint(4, 40), rng.randint(2, 25)
    length = width + more
    around, area = 2 * (width + length), width * length
    text = rng.choice((
        f"The length of a rectangular garden is {more} meters more than its width, and its perimeter is {around} "
        f"meters. What is the area of the garden in square meters?",
        f"A rectangular field is enclosed by {around} meters of fence. Its length is {more} meters greater than its "
        f"width. Find its area in square meters."))
    if rng.random() < 0.5:
        half = around // 2
        lines = (f"Length and width add up to {around} / 2 = {half} and differ by {more}.",
                 f"The width is ({half} - {more}) / 2 = {width} and the length is {width} + {more} = {length}.",
                 f"The area is {length} * {width} = {area}.")
        strategy = plan("rectangle from perimeter and side difference",
                        "Half the perimeter is the sum of the sides; with the difference this gives both sides.",
                        "Halve the perimeter.",
                        "Subtract the difference from this sum and halve to get the shorter side.",
                        "Add the difference to get the longer side.", "Multiply the sides.")
    else:
        lines = (f"Let w be the width. The perimeter is 2(w + w + {more}), so 4w + {2 * more} = {around}.",
                 f"So w is ({around} - {2 * more}) / 4 = {width}, and the length is {width} + {more} = {length}.",
                 f"The area is {length} * {width} = {area}.")
        strategy = plan("rectangle from perimeter and side difference",
                        "Write the perimeter as an equation in the width alone.",
                        "Call the width w and express the length by it.",
                        "Set up the perimeter equation and solve for w.",
                        "Compute the length and multiply it by the width.")
    return made((more, around), text, area, lines, strategy)


def right_triangle(rng: random.Random) -> Item | None:
    """The hypotenuse in simplest radical form."""
    name = rng.choice(NAMES)[0]
    a, b = sorted(rng.sample(range(2, 31), 2))
    square = a * a + b * b
    outside = max(r for r in range(1, 50) if square % (r * r) == 0)
    inside = square // outside**2
    if outside == 1:  # nothing to simplify
        return None
    answer = str(outside) if inside == 1 else f"{outside}\\sqrt{{{inside}}}"
    text = rng.choice((
        f"The legs of a right triangle measure {a} centimeters and {b} centimeters. How many centimeters long is the "
        f"hypotenuse? Give the exact value in simplest form.",
        f"{name} walks {a} kilometers due east and then {b} kilometers due north. How many kilometers is {name} from "
        f"the starting point, in a straight line? Give the exact value in simplest form.",
        f"A rectangular park is {a} meters wide and {b} meters long. How many meters long is a straight path from one "
        f"corner to the opposite corner? Give the exact value in simplest form."))
    lines = (f"By the theorem of Pythagoras the square of the length is {a} * {a} + {b} * {b} = {square}.",
             f"The largest square factor: {square} = {outside} * {outside} * {inside}.",
             f"So the length is \\sqrt{{{square}}} = {answer}.")
    strategy = plan("right triangle, hypotenuse from the legs", "Use the theorem of Pythagoras and simplify the root.",
                    "Recognize the right angle and the two legs.", "Square the legs and add the squares.",
                    "Take the square root.", "Move the largest square factor out of the root.")
    return made((a, b), text, answer, lines, strategy)


def triangle_angles(rng: random.Random) -> Item | None:
    """Three angles, described by the first one."""
    k, x = rng.randint(2, 6), rng.randint(11, 45)
    more = 180 - (k + 2) * x
    if not 4 <= more <= 100:
        return None
    largest = max(k * x, x + more)
    text = rng.choice((
        f"In a triangle, the second angle is {k} times the first angle, and the third angle is {more} degrees larger "
        f"than the first angle. How many degrees does the largest angle measure?",
        f"The angles of a triangle are x, {k}x and x + {more}, in degrees. Find the largest angle in degrees."))
    lines = (f"The angles add up to 180 degrees: x + {k}x + x + {more} = 180.",
             f"There are 1 + {k} + 1 = {k + 2} times x.",
             f"So x is (180 - {more}) / {k + 2} = {x}.",
             f"The other angles are {k} * {x} = {k * x} and {x} + {more} = {x + more}.",
             f"The largest is {largest} degrees.")
    strategy = plan("angles of a triangle",
                    "The angles of a triangle add up to a straight angle, which gives an equation for the first.",
                    "Call the first angle x and express the other angles by it.",
                    "Set the sum of the angles equal to the angle sum of a triangle and solve for x.",
                    "Compute all the angles and compare them.")
    return made((k, more), text, largest, lines, strategy)


def product_expression(rng: random.Random) -> Item:
    """A product of two linear factors, multiplied out."""
    a, b = rng.sample(range(2, 20), 2)
    story = rng.random() < 0.5
    p, q = (a, b) if story else (a * rng.choice((1, -1)), b * rng.choice((1, -1)))
    left, right = signed(((1, "x"), (p, ""))), signed(((1, "x"), (q, "")))
    answer = signed(((1, "x^2"), (p + q, "x"), (p * q, "")))
    text = f"Multiply out and simplify: ({left})({right})."
    if story:
        text = rng.choice((
            f"A rectangle has the sides {left} and {right}. Write its area as a polynomial in x, multiplied out and "
            "simplified.",
            f"A square patio has sides of length x. It is made {a} meters longer in one direction and {b} meters "
            f"longer in the other. Write the new area as a polynomial in x, multiplied out and simplified."))
    p_text, q_text = (str(n) if n > 0 else f"({n})" for n in (p, q))
    lines = (f"The product is ({left})({right}).", f"The coefficient of x is the sum {p_text} + {q_text} = {p + q}.",
             f"The constant is the product {p_text} * {q_text} = {p * q}.", f"So the product is {answer}.")
    strategy = plan("product of two linear factors",
                    "Multiply every term of one factor by every term of the other and collect like terms.",
                    "Write the quantity as a product of two factors in x.",
                    "Multiply the x terms, the mixed terms and the constants.",
                    "Add the mixed terms, with their signs.",
                    "Write the terms in falling powers of x.")
    return made((a, b), text, answer, lines, strategy)


# -------------------------------------------------------------------------------------------------------- number theory


def greatest_divisor(rng: random.Random) -> Item | None:
    """A greatest common divisor behind a story."""
    x, y = rng.sample(range(2, 15), 2)
    g = rng.randint(4, 24)
    if math.gcd(x, y) > 1:
        return None
    a, b = g * max(x, y), g * min(x, y)
    text = rng.choice((
        f"A teacher has {a} pencils and {b} erasers and makes identical gift bags, using up everything. What is the "
        f"greatest possible number of bags?",
        f"Two ropes, {a} and {b} centimeters long, are cut into pieces that all have the same length, with nothing "
        f"left over. How many centimeters long can the pieces be at most?",
        f"A sheet of {a} by {b} centimeters is cut into equal squares with nothing left over. What is the largest "
        f"possible side of the squares, in centimeters?"))
    if rng.random() < 0.5:
        common = primes(g)
        lines = (f"Factor both: {a} = {power_text(primes(a))} and {b} = {power_text(primes(b))}.",
                 f"The common prime powers give {power_text(common)} = {g}.")
        strategy = plan("greatest common divisor",
                        "The quantity must divide both numbers, so take the greatest common divisor from the "
                        "prime factors.", "Factor both numbers into primes.",
                        "Take each common prime with the smaller exponent.", "Multiply these powers.")
    else:
        lines, m, n = (), a, b
        while n:
            lines += (f"Dividing {m} by {n} leaves the remainder {m % n}: {m} - {m // n} * {n} = {m % n}.",)
            m, n = n, m % n
        lines += (f"The last divisor is {g}.",)
        strategy = plan("greatest common divisor",
                        "The quantity must divide both numbers, so find the greatest common divisor by "
                        "repeated division.", "Divide the larger number by the smaller and keep the remainder.",
                        "Replace the pair by the smaller number and the remainder, and repeat.",
                        "Stop at remainder zero; the last divisor is the result.")
    return made((a, b), text, g, lines, strategy)


def least_multiple(rng: random.Random) -> Item | None:
    """A least common multiple behind a story."""
    a, b = sorted(rng.sample(range(6, 61), 2))
    least = math.lcm(a, b)
    if math.gcd(a, b) == 1 or b % a == 0 or least > 12 * b:
        return None
    text = rng.choice((
        f"Two bus lines start together at a station. One bus leaves every {a} minutes and the other every {b} "
        f"minutes. After how many minutes do two buses leave together again?",
        f"One lighthouse flashes every {a} seconds and another every {b} seconds. They have just flashed together. "
        f"How many seconds pass until they flash together again?",
        f"Candles are sold in packs of {a} and holders in packs of {b}. What is the smallest number of candles that "
        f"gives exactly as many candles as holders when only full packs are bought?"))
    if rng.random() < 0.5:
        lines = (f"Factor both: {a} = {power_text(primes(a))} and {b} = {power_text(primes(b))}.",
                 f"The highest power of each prime gives {power_text(primes(least))} = {least}.")
        strategy = plan("least common multiple",
                        "The events coincide at common multiples, so find the smallest one from the prime factors.",
                        "Factor both numbers into primes.", "Take each prime that occurs with its larger exponent.",
                        "Multiply these powers.")
    else:
        tried = ", ".join(str(b * i) for i in range(1, least // b + 1))
        lines = (f"The multiples of {b} are {tried} and so on.",
                 f"The first of them that {a} divides is {least}: {least} / {a} = {least // a}.")
        strategy = plan("least common multiple",
                        "Go through the multiples of the larger number until one is also a multiple of the smaller.",
                        "List the multiples of the larger number in order.",
                        "Test each for divisibility by the smaller number.", "Stop at the first that passes.")
    return made((a, b), text, least, lines, strategy)


def two_remainders(rng: random.Random) -> Item | None:
    """The smallest number with two given remainders."""
    m, n = sorted(rng.sample(range(4, 14), 2))
    if math.gcd(m, n) > 1:
        return None
    r, s = rng.randint(1, m - 1), rng.randint(1, n - 1)
    answer = next(x for x in range(1, m * n + 1) if x % m == r and x % n == s)
    if answer <= n:
        return None
    text = rng.choice((
        f"What is the smallest positive integer that leaves remainder {r} when divided by {m} and remainder {s} when "
        f"divided by {n}?",
        f"When chairs are put in rows of {m}, {r} {'is' if r == 1 else 'are'} left over. When they are put in rows of "
        f"{n}, {s} {'is' if s == 1 else 'are'} left over. What is the smallest possible number of chairs?"))
    tried = ", ".join(str(x) for x in range(s, answer + 1, n))
    lines = (f"The numbers with remainder {s} for {n} are {tried} and so on.",
             f"The first of them with remainder {r} for {m} is {answer}: {answer} - {answer // m} * {m} = {r}.")
    strategy = plan("two remainder conditions",
                    "List the numbers that meet the condition with the larger divisor and test the other condition.",
                    "Start at the remainder of the larger divisor and keep adding that divisor.",
                    "Divide each number by the other divisor and look at the remainder.",
                    "Stop at the first number with the wanted remainder.")
    return made((r, m, s, n), text, answer, lines, strategy)


def units_digit(rng: random.Random) -> Item | None:
    """The last digit of a power."""
    base, exponent = rng.randint(12, 99), rng.randint(11, 120)
    last = base % 10
    if last in (0, 1, 5, 6):  # these never change
        return None
    cycle = [last]
    while cycle[-1] * last % 10 != last:
        cycle.append(cycle[-1] * last % 10)
    period = len(cycle)
    place = exponent % period or period
    text = rng.choice((
        f"What is the units digit of ${base}^{{{exponent}}}$?",
        f"Find the remainder when ${base}^{{{exponent}}}$ is divided by 10.",
        f"A number is the product of {exponent} factors that are all equal to {base}. What is its last digit?"))
    lines = (f"Only the last digit {last} matters. The powers end in {', '.join(map(str, cycle))} and then repeat "
             f"with period {period}.",
             f"The exponent gives {exponent} - {(exponent - place) // period} * {period} = {place}, so take number "
             f"{place} in the cycle.",
             f"That is the digit {cycle[place - 1]}.")
    strategy = plan("last digit of a power",
                    "The last digits of the powers repeat in a short cycle, so only the place in the cycle matters.",
                    "Keep only the last digit of the base and write the last digits of its first powers.",
                    "Find the length of the cycle.",
                    "Divide the exponent by this length and use the remainder as the place; remainder "
                    "zero means the last place.")
    return made((base, exponent), text, cycle[place - 1], lines, strategy)


def divisor_count(rng: random.Random) -> Item | None:
    """The number of divisors, from the prime exponents."""
    n = rng.randint(24, 1500)
    powers = primes(n)
    count = math.prod(e + 1 for e in powers.values())
    if len(powers) < 2 or max(powers) > 13 or count < 6:
        return None
    text = rng.choice((
        f"How many positive divisors does {n} have?",
        f"A gardener plants {n} tulips in rows with the same number of tulips in each row. How many different numbers "
        f"of rows are possible?"))
    product = " * ".join(f"({e} + 1)" for e in powers.values())
    lines = (f"Factor the number: {n} = {power_text(powers)}.",
             f"A divisor takes each prime with an exponent from 0 up to the one above, so there are {product} = "
             f"{count} divisors.")
    strategy = plan("number of divisors",
                    "A divisor is fixed by its exponents in the prime factorisation, so multiply the numbers of "
                    "choices.",
                    "Factor the number into primes.", "Increase each exponent by one.", "Multiply the results.")
    return made((n,), text, count, lines, strategy)


def count_multiples(rng: random.Random) -> Item:
    """How many multiples lie in a range."""
    k, low = rng.randint(3, 17), rng.randint(20, 300)
    high = low + rng.randint(60, 500)
    answer = high // k - (low - 1) // k
    text = rng.choice((
        f"How many integers from {low} to {high}, inclusive, are divisible by {k}?",
        f"The tickets of a raffle are numbered from {low} to {high}. Every ticket whose number is a multiple of {k} "
        f"wins a prize. How many tickets win?"))
    if rng.random() < 0.5:
        up, below = high // k, (low - 1) // k
        lines = (f"Up to {high} there are {up} multiples, since {up} * {k} = {up * k} is the last one.",
                 f"Up to {low - 1} there are {below}, since {below} * {k} = {below * k} is the last one.",
                 f"The difference is {up} - {below} = {answer}.")
        strategy = plan("counting multiples in a range",
                        "Count the multiples up to the top and subtract those below the bottom.",
                        "Divide the upper end by the divisor and round down.",
                        "Do the same with the integer just below the lower end.", "Subtract.")
    else:
        first, last = -(-low // k) * k, high // k * k
        lines = (f"The first multiple in the range is {first // k} * {k} = {first}, the last is {last // k} * {k} = "
                 f"{last}.",
                 f"There are ({last} - {first}) / {k} + 1 = {answer} of them.")
        strategy = plan("counting multiples in a range",
                        "Find the first and the last multiple and count the steps between them.",
                        "Find the smallest and the largest multiple in the range.",
                        "Divide their difference by the divisor.", "Add one, since both ends count.")
    return made((low, high, k), text, answer, lines, strategy)


# ------------------------------------------------------------------------------------- counting, probability, sequences


def pairs(rng: random.Random) -> Item:
    """Every pair meets, once or several times."""
    n, k = rng.randint(5, 32), rng.randint(2, 6)
    each = n * (n - 1) // 2
    answer = each * k
    text = rng.choice((
        f"In a league of {n} teams, each pair of teams plays {k} games in a season. How many games are played in the "
        "season?",
        f"At each of {k} meetings, all {n} members of a club shake hands with one another exactly once. How many "
        f"handshakes are there in total?"))
    if rng.random() < 0.5:
        lines = (f"Each of {n} has {n} - 1 = {n - 1} partners, and each pair is counted twice: {n} * {n - 1} / 2 = "
                 f"{each} pairs.",
                 f"With {k} for each pair that is {each} * {k} = {answer}.")
        strategy = plan("counting pairs",
                        "Count the ordered pairs and halve, because each pair is counted from both sides.",
                        "Multiply the number of members by the number of partners each has.", "Halve the product.",
                        "Multiply by how often each pair meets.")
    else:
        lines = (f"The first has {n - 1} partners, the next {n - 2} new ones, and so on down to 1.",
                 f"The sum of the integers from 1 to {n - 1} is ({n - 1} + 1) * {n - 1} / 2 = {each}.",
                 f"With {k} for each pair that is {each} * {k} = {answer}.")
        strategy = plan("counting pairs", "Let the members come in one after the other and count only the new pairs.",
                        "Note that each new member forms a pair with everybody already counted.",
                        "Add the consecutive integers that arise.", "Multiply by how often each pair meets.")
    return made((n, k), text, answer, lines, strategy)


def committee(rng: random.Random) -> Item:
    """Choosing from two groups."""
    n, m = rng.sample(range(4, 11), 2)
    k, j = rng.randint(2, 3), rng.randint(1, 3)
    x, y = math.comb(n, k), math.comb(m, j)
    girls = f"{j} girl" + "s" * (j > 1)
    red = f"{j} red one" + "s" * (j > 1)
    text = rng.choice((
        f"A class has {n} boys and {m} girls. In how many ways can a team of {k} boys and {girls} be chosen?",
        f"A shelf holds {n} different blue books and {m} different red books. In how many ways can {k} blue books and "
        f"{red} be picked, if the order does not matter?"))
    lines = tuple(
        f"There are {of} ways to choose 1 of {of}." if size == 1 else
        f"To choose {size} of {of} there are ({' * '.join(str(of - i) for i in range(size))}) / "
        f"({' * '.join(str(size - i) for i in range(size))}) = {ways} ways."
        for of, size, ways in ((n, k, x), (m, j, y)))
    lines += (f"Together there are {x} * {y} = {x * y} ways.",)
    strategy = plan("choosing from two groups",
                    "The choices in the two groups are independent, so multiply the numbers of combinations.",
                    "Count the ways to choose from the first group, without regard to order.",
                    "Count the ways to choose from the second group in the same way.", "Multiply the two counts.")
    return made((n, m, k, j), text, x * y, lines, strategy)


def draw_two(rng: random.Random) -> Item:
    """Two draws without replacement, both of one color."""
    r, b = rng.sample(range(2, 15), 2)
    n = r + b
    both = Fraction(r * (r - 1), n * (n - 1))
    text = rng.choice((
        f"A bag contains {r} red marbles and {b} blue marbles. Two marbles are drawn at random without replacement. "
        f"What is the probability that both are red? Give a fraction in lowest terms.",
        f"A drawer holds {r} black socks and {b} white socks. Two socks are taken out at random, one after the other "
        f"and without putting any back. Find the probability, as a fraction in lowest terms, that both socks are "
        "black."))
    if rng.random() < 0.5:
        lines = (f"There are {r} + {b} = {n} in all. The first one fits with probability {r}/{n}.",
                 f"Then {r - 1} of {n - 1} are left that fit, so the second one fits with probability {r - 1}/{n - 1}.",
                 f"The product is {r}/{n} * {r - 1}/{n - 1} = {both}.")
        strategy = plan("two draws without replacement",
                        "Multiply the probability of the first draw by that of the second, given the first.",
                        "Find the total and the probability of the wanted color in the first draw.",
                        "Reduce both the wanted color and the total by one for the second draw.",
                        "Multiply the probabilities and reduce the fraction.")
    else:
        good, total = math.comb(r, 2), math.comb(n, 2)
        lines = (f"There are {r} + {b} = {n} in all and {n} * {n - 1} / 2 = {total} pairs, all equally likely.",
                 f"The pairs that fit number {r} * {r - 1} / 2 = {good}.", f"The probability is {over(good, total)}.")
        strategy = plan("two draws without replacement",
                        "Divide the number of favorable pairs by the number of all pairs.",
                        "Count all pairs that can be drawn, without regard to order.",
                        "Count the pairs with the wanted color only.", "Divide and reduce the fraction.")
    return made((r, b), text, tex(both), lines, strategy)


def dice_sum(rng: random.Random) -> Item:
    """The sum of two dice with a given number of faces."""
    n = rng.choice((4, 6, 8, 10, 12, 20))
    s = rng.randint(3, 2 * n - 1)
    low, high = max(1, s - n), min(n, s - 1)
    ways = high - low + 1
    text = rng.choice((
        f"Two fair dice, each with {n} faces numbered from 1 to {n}, are rolled. What is the probability that the sum "
        f"is {s}? Give a fraction in lowest terms.",
        f"A fair spinner has {n} equal sectors numbered from 1 to {n}. It is spun twice. Find the probability, as a "
        f"fraction in lowest terms, that the two results add up to {s}."))
    lines = (f"There are {n} * {n} = {n * n} equally likely pairs.",
             f"The first result can be anything from {low} to {high}, and the second is then fixed: {high} - {low} + "
             f"1 = {ways} pairs.",
             f"The probability is {over(ways, n * n)}.")
    strategy = plan("probability of a sum", "Count the ordered pairs with the wanted sum among all ordered pairs.",
                    "Count all ordered pairs of results.",
                    "Find the range of first results for which a second result exists.",
                    "Count these pairs.", "Divide and reduce the fraction.")
    return made((n, s), text, tex(Fraction(ways, n * n)), lines, strategy)


def arithmetic_sum(rng: random.Random) -> Item:
    """The sum of an arithmetic sequence."""
    name, she, _ = rng.choice(NAMES)
    first, step, n = rng.randint(5, 40), rng.randint(2, 9), rng.randint(6, 30)
    last = first + (n - 1) * step
    total = n * (first + last) // 2
    text = rng.choice((
        f"The first row of a theater has {first} seats, and each row after it has {step} seats more than the row "
        f"before. The theater has {n} rows. How many seats are there in total?",
        f"{name} saves ${first} in the first week, and each week after that {she} saves ${step} more than in the week "
        f"before. How many dollars does {she} save in {n} weeks?",
        f"An arithmetic sequence starts with {first} and has the common difference {step}. What is the sum of its "
        f"first {n} terms?"))
    if rng.random() < 0.5:
        lines = (f"The last term is {first} + ({n} - 1) * {step} = {last}.",
                 f"The sum is ({first} + {last}) * {n} / 2 = {total}.")
        strategy = plan("sum of an arithmetic sequence",
                        "The sum is the mean of the first and the last term times the number of terms.",
                        "Find the last term from the first term and the common difference.",
                        "Add the first and the last term and halve.",
                        "Multiply by the number of terms.")
    else:
        extra = step * n * (n - 1) // 2
        lines = (f"Without the growth the sum would be {n} * {first} = {n * first}.",
                 f"The growth adds {step} times the sum from 1 to {n - 1}: {step} * {n} * {n - 1} / 2 = {extra}.",
                 f"Together that is {n * first} + {extra} = {total}.")
        strategy = plan("sum of an arithmetic sequence",
                        "Split each term into the first term and the growth since then, and sum both parts.",
                        "Multiply the first term by the number of terms.",
                        "Multiply the common difference by the sum of the integers below the number of terms.",
                        "Add the two parts.")
    return made((first, step, n), text, total, lines, strategy)


def nth_term(rng: random.Random) -> Item:
    """The n-th term of an arithmetic sequence, as an expression."""
    first, step = rng.randint(1, 30), rng.randint(2, 12)
    terms = tuple(first + i * step for i in range(4))
    shift = first - step
    answer = signed(((step, "n"), (shift, "")))
    listed = ", ".join(map(str, terms))
    text = rng.choice((
        f"The sequence {listed}, ... grows by the same amount at each step. Write its n-th term as an expression in "
        f"n, counting from n = 1.",
        f"A pattern is laid with {terms[0]} tiles in figure 1, {terms[1]} tiles in figure 2, {terms[2]} tiles in "
        f"figure 3 and {terms[3]} tiles in figure 4, and goes on in the same way. Write the number of tiles in figure "
        "n as an expression in n."))
    lines = (f"The step is {terms[1]} - {first} = {step}, so the term is {step}n plus a constant.",
             f"For n equal to 1 the term is {first}, so the constant is {first} - {step} = {shift}.",
             f"The term is {answer}.")
    strategy = plan("formula for an arithmetic sequence",
                    "The common difference is the coefficient of n, and the first term fixes the constant.",
                    "Subtract neighboring terms to get the common difference.",
                    "Write the term as the difference times n plus a constant.",
                    "Use the first term to find the constant.")
    return made(terms, text, answer, lines, strategy)


# ------------------------------------------------------------------------------------------- held out: never trained on


def mixture(rng: random.Random) -> Item | None:
    """Mixing two concentrations to a third."""
    weak, target, strong = sorted(5 * c for c in rng.sample(range(1, 19), 3))
    volume = rng.randint(2, 60)
    added = Fraction(volume * (target - weak), strong - target)
    if added.denominator != 1 or not 2 <= added <= 150:
        return None
    text = rng.choice((
        f"How many liters of a {strong}% salt solution must be added to {volume} liters of a {weak}% salt solution to "
        f"get a {target}% salt solution?",
        f"A chemist has {volume} milliliters of a solution that is {weak}% acid. How many milliliters of a {strong}% "
        f"acid solution should the chemist add to make the mixture {target}% acid?",
        f"A farmer has {volume} liters of a drink with {weak}% juice. How many liters of a drink with {strong}% juice "
        f"must be poured in so that the mixture contains {target}% juice?"))
    if rng.random() < 0.5:
        lines = (f"Let x be the added amount. The pure parts satisfy {weak} * {volume} + {strong}x = "
                 f"{target}({volume} + x).",
                 f"The x terms differ by {strong} - {target} = {strong - target} times x, and the constants by "
                 f"({target} - {weak}) * {volume} = {(target - weak) * volume}.",
                 f"So x is {(target - weak) * volume} / {strong - target} = {added}.")
        strategy = plan("mixture of two concentrations",
                        "Balance the amount of the pure substance before and after mixing.",
                        "Call the added amount x and write the pure substance in each part as concentration times "
                        "amount.",
                        "Set the sum of the parts equal to the pure substance in the mixture.",
                        "Solve the linear equation for x.")
    else:
        lines = (f"The given part lies {target} - {weak} = {target - weak} points below the target, the added part "
                 f"{strong} - {target} = {strong - target} points above it.",
                 f"The amounts balance, so the added amount is {volume} * {target - weak} / {strong - target} = "
                 f"{added}.")
        strategy = plan("mixture of two concentrations",
                        "The amounts stand in the inverse ratio of their distances from the target concentration.",
                        "Find how far each concentration lies from the target.",
                        "Multiply the known amount by its own distance.", "Divide by the distance of the added part.")
    return made((weak, target, strong, volume), text, added, lines, strategy)


def neither(rng: random.Random) -> Item:
    """Two overlapping groups, and those in neither."""
    only_a, only_b, both, none = (rng.randint(2, 45) for _ in range(4))
    a, b, n = only_a + both, only_b + both, only_a + only_b + both + none
    text = rng.choice((
        f"In a year group of {n} students, {a} study French, {b} study Spanish and {both} study both languages. How "
        f"many students study neither language?",
        f"Of {n} guests at a hotel, {a} use the pool, {b} use the gym and {both} use both. How many guests use "
        f"neither the pool nor the gym?",
        f"A survey asks {n} people about their pets: {a} have a cat, {b} have a dog, and {both} have both. How many "
        f"of them have neither a cat nor a dog?"))
    if rng.random() < 0.5:
        lines = (f"At least one applies to {a} + {b} - {both} = {a + b - both}, because those with both were counted "
                 "twice.",
                 f"Neither applies to {n} - {a + b - both} = {none}.")
        strategy = plan("two overlapping groups", "Add the groups, correct for those counted twice, and take the rest.",
                        "Add the sizes of the two groups.",
                        "Subtract the overlap once to get those in at least one group.",
                        "Subtract this from the whole.")
    else:
        lines = (f"Only the first applies to {a} - {both} = {only_a}, only the second to {b} - {both} = {only_b}.",
                 f"Together with the overlap that is {only_a} + {only_b} + {both} = {a + b - both}.",
                 f"Neither applies to {n} - {a + b - both} = {none}.")
        strategy = plan("two overlapping groups",
                        "Divide everybody into separate regions: only the first, only the second, both, neither.",
                        "Subtract the overlap from each group to get those in exactly one of them.",
                        "Add the separate regions.", "Subtract the sum from the whole.")
    return made((n, a, b, both), text, none, lines, strategy)


def named(*families: Family) -> tuple[tuple[str, Family], ...]:
    """(name, family) each: the name in the rows' ids is the function's, with dashes."""
    return tuple((family.__name__.replace("_", "-"), family) for family in families)


TRAINED = named(
    one_step, change, packs, unit_rate, percent_rest, reverse_percent, average_needed, unit_conversion, ratio_share,
    fraction_left, discount_tax, profit, linear_undo, linear_both_sides, consecutive, ages, heads_legs, work_together,
    two_legs, meet_or_chase, elapsed_time, rectangle_area, right_triangle, triangle_angles, product_expression,
    greatest_divisor, least_multiple, two_remainders, units_digit, divisor_count, count_multiples, pairs, committee,
    draw_two, dice_sum, arithmetic_sum, nth_term,
)
HELD_OUT = named(mixture, neither)


# ------------------------------------------------------------------------------------------------------ the three files


def draw(name: str, family: Family, seed: int, count: int) -> list[dict]:
    """`count` rows of one family, no two with the same operands (in any order).

    Raises ValueError where the family cannot give that many, or where a strategy holds a digit.
    """
    rng = random.Random(f"{seed}-{name}")  # a stream per family: adding a family leaves the others' rows as they are
    rows, used = [], set()
    for _ in range(MAX_DRAWS):
        if len(rows) == count:
            return rows
        item = family(rng)
        if item is None:
            continue
        operands, problem, answer, solution, strategy = item
        # In any order: 3:5 and 5:3 of the same total would be too close to stand on two sides of the split.
        key = tuple(sorted(map(str, operands)))
        if key in used:
            continue
        used.add(key)
        if re.search(r"\d", json.dumps(strategy)):
            raise ValueError(f"family {name}: a strategy may hold no digit, got {strategy}")
        rows.append({"id": f"starter-{name}-{len(rows) + 1}", "problem": problem, "answer": answer,
                     "solution": solution, "strategy": strategy})
    raise ValueError(f"family {name}: only {len(rows)} of {count} rows after {MAX_DRAWS} draws")


def build(seed: int) -> tuple[list[dict], list[dict], list[dict]]:
    """The rows of train, test and heldout for a seed; a pure function.

    The families take turns, so any prefix of a file is a fair sample of them.

    Raises ValueError where a problem text occurs twice.
    """
    drawn = [draw(name, family, seed, TRAIN_ROWS + TEST_ROWS) for name, family in TRAINED]
    held = [draw(name, family, seed, HELDOUT_ROWS) for name, family in HELD_OUT]
    train = [rows[k] for k in range(TRAIN_ROWS) for rows in drawn]
    test = [rows[k] for k in range(TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS) for rows in drawn]
    heldout = [rows[k] for k in range(HELDOUT_ROWS) for rows in held]
    texts = set()
    for row in train + test + heldout:
        if row["problem"] in texts:
            raise ValueError(f"{row['id']}: this problem text occurs twice: {row['problem']!r}")
        texts.add(row["problem"])
    return train, test, heldout


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="Write the starter set: train.jsonl, test.jsonl and heldout.jsonl.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="the committed files have seed 0")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test", "heldout"), build(args.seed), strict=True):
        # newline fixed, so that the bytes are the same on every system
        with open(args.out / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{args.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
