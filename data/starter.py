"""The starter set: word problems with an answer, a worked solution and a strategy, all our own.

It is data to start from: train.py uses it when a real model is given without --data, so a first run needs no download. Each
family of problems is one small function, which draws the operands, writes the text and works the solution. Every number in a
solution is computed from the operands, none is typed. Strategies are fixed texts in starter_strategies.json, one or two for
each family: a strategy names the approach and is the same whatever the operands, so it cannot leak an answer.

It is not a benchmark. The problems are easy to middling (from one step to a competition's first questions), the wording comes
from a few templates, and a high score here says little about other problems.

train.jsonl and test.jsonl hold the same families with different operands; heldout.jsonl holds two families that training never
sees. From the repository root, this writes the committed files again, byte for byte:

    python data/starter.py --out data/starter --seed 0

With --alone and --guided it writes rows for another purpose: a policy that follows a strategy and does not find it by itself
(runs/transfer.sh).
"""

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

# Run as a script, Python looks for modules in data/ and not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from strategy import DEFAULT, Strategy, guided_messages

TRAIN_ROWS = 20  # rows a family in train.jsonl
TEST_ROWS = 4  # rows a family in test.jsonl, drawn after the train rows and with operands of their own
HELDOUT_ROWS = 25  # rows a held-out family
MAX_DRAWS = 20_000  # a family that needs more has too few operands to choose from
STRATEGIES = json.loads(Path(__file__).with_name("starter_strategies.json").read_text(encoding="utf-8"))

# What a family returns: (operands, problem, answer, solution, which of its strategies), or None if the drawn operands do not
# suit and the caller has to draw again.
Item = tuple[tuple, str, str, str, int]
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


def made(operands: tuple, problem: str, answer: object, lines: tuple, way: int) -> Item:
    """Put an item together: the solution is the lines, then the boxed answer."""
    return operands, problem, str(answer), "\n".join((*lines, f"The answer is \\boxed{{{answer}}}")), way


def money(cents: int) -> str:
    """Cents as dollars with two decimals: 250 -> "2.50"."""
    return f"{cents // 100}.{cents % 100:02d}"


def tex(value: Fraction) -> str:
    """A fraction as the answer is written: "7" or "\\frac{7}{3}"."""
    return str(value.numerator) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def over(a: int, b: int) -> str:
    """The quotient for a solution line: "13/2", or "12/8 = 3/2" if it can be reduced."""
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
        answer, texts = a + b, (
            f"{a_name} has {a} {thing} and {b_name} has {b} {thing}. How many {thing} do they have together?",
            f"A museum had {a} visitors in the morning and {b} visitors in the afternoon. How many visitors came that day?")
    elif op == "-":
        a = rng.randint(60, 600)
        b = rng.randint(15, a - 12)
        answer, texts = a - b, (
            f"{a_name} had {a} {thing} and gave {b} of them to {b_name}. How many {thing} does {a_name} have left?",
            f"A baker made {a} rolls and sold {b} of them by noon. How many rolls were left?")
    elif op == "*":
        a, b = rng.randint(6, 28), rng.randint(6, 40)
        answer, texts = a * b, (
            f"{a_name} fills {a} boxes with {b} {thing} each. How many {thing} does {she} put into the boxes?",
            f"A theater has {a} rows with {b} seats in each row. How many seats does the theater have?")
    else:
        b, answer = rng.randint(3, 16), rng.randint(6, 45)
        a = b * answer
        texts = (
            f"{a_name} shares {a} {thing} equally among {b} friends. How many {thing} does each friend get?",
            f"A gardener has {a} bulbs and plants {b} bulbs in each pot. How many pots does the gardener need?")
    lines = (f"The story asks for {a} {op} {b} = {answer}.",)
    return made((a, b), rng.choice(texts), answer, lines, "+-*/".index(op))


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 1:
        lines = (lines[0], f"After the {x}, {bill} - {money(n * p)} = {money(100 * bill - n * p)} dollars are left.",
                 f"After the {y}, {money(100 * bill - n * p)} - {money(m * q)} = {answer} dollars are left.")
    return made((n, money(p), m, money(q), bill), text, answer, lines, way)


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
    return made((n, k, aside, shares), text, each, lines, 0)


def unit_rate(rng: random.Random) -> Item:
    """A constant rate, by the unit or by a scale factor."""
    name = rng.choice(NAMES)[0]
    b = rng.randint(3, 12)
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        rate = rng.randint(12, 48)
        a, c = rate * b, b + rng.randint(1, 15)
        answer = rate * c
        lines = (f"In one minute that is {a} / {b} = {rate}.", f"In {c} minutes it is {rate} * {c} = {answer}.")
    else:
        times, a = rng.randint(2, 9), b * rng.randint(12, 30) + rng.randint(1, b - 1)
        c = times * b
        answer = times * a
        lines = (f"The time grows by the factor {c} / {b} = {times}.",
                 f"The amount grows by the same factor: {a} * {times} = {answer}.")
    text = rng.choice((
        f"A machine fills {a} bottles in {b} minutes. At the same rate, how many bottles does it fill in {c} minutes?",
        f"{name} types {a} words in {b} minutes. At this speed, how many words does {name} type in {c} minutes?",
        f"A pump moves {a} liters of water in {b} minutes. If it keeps working at this rate, how many liters does it "
        f"move in {c} minutes?"))
    return made((a, b, c), text, answer, lines, way)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"The part is {n} * {p} / 100 = {part}.", f"The rest is {n} - {part} = {rest}.")
    else:
        lines = (f"The rest is 100 - {p} = {100 - p} percent of the whole.", f"That is {n} * {100 - p} / 100 = {rest}.")
    return made((n, p), text, rest, lines, way)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        factor = f"{share / 100:g}"
        lines = (f"The old amount was multiplied by 1 {word} {p} / 100 = {factor}.",
                 f"So the old amount is {new} / {factor} = {old}.")
    else:
        lines = (f"The amount now is 100 {word} {p} = {share} percent of the old amount.",
                 f"One percent is {new} / {share}, so the old amount is {new} / {share} * 100 = {old}.")
    return made((p, new), text, old, lines, way)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"So far the total is {k} * {mean} = {k * mean}.",
                 f"The total needed is {k + 1} * {target} = {(k + 1) * target}.",
                 f"The next value is {(k + 1) * target} - {k * mean} = {answer}.")
    else:
        gap = target - mean
        lines = (f"Each earlier value is short of the new average by {target} - {mean} = {gap} on average.",
                 f"The next value must make up {k} * {gap} = {k * gap}.", f"So it is {target} + {k * gap} = {answer}.")
    return made((k, mean, target), text, answer, lines, way)


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
    return made((a, b), text.format(a=a, b=b), total // b, lines, 0)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"There are {a} + {b} = {a + b} equal parts.", f"One part is {total} / {a + b} = {part}.",
                 f"So {a} parts are {a} * {part} = {answer}.")
    else:
        lines = (f"The first share is {a}/{a + b} of the total.", f"That is {a} * {total} / {a + b} = {answer}.")
    return made((a, b, total), text, answer, lines, way)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"The first use takes {total} * {a} / {b} = {total - rest}, so {total} - {total - rest} = {rest} "
                 "remain.",
                 f"The second use takes {rest} * {c} / {d} = {rest - left}, so {rest} - {rest - left} = {left} remain.")
    else:
        both = Fraction(b - a, b) * Fraction(d - c, d)
        lines = (f"First 1 - {a}/{b} = {b - a}/{b} of the whole remains, then 1 - {c}/{d} = {d - c}/{d} of that.",
                 f"Together {b - a}/{b} * {d - c}/{d} = {both} of the whole remains.",
                 f"That is {total} * {both} = {left}.")
    return made((total, a, b, c, d), text, left, lines, way)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"The discount is {price} * {off} / 100 = {money(price * off)} dollars.",
                 f"The sale price is {price} - {money(price * off)} = {money(sale)} dollars.",
                 f"The tax is {money(sale)} * {tax} / 100 = {money(final - sale)} dollars.",
                 f"The final price is {money(sale)} + {money(final - sale)} = {money(final)} dollars.")
    else:
        keep, grow = f"{(100 - off) / 100:g}", f"{(100 + tax) / 100:g}"
        lines = (f"The discount multiplies the price by 1 - {off} / 100 = {keep}, the tax by 1 + {tax} / 100 = {grow}.",
                 f"After the discount the price is {price} * {keep} = {money(sale)} dollars.",
                 f"With tax it is {money(sale)} * {grow} = {money(final)} dollars.")
    return made((price, off, tax), text, money(final), lines, way)


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
        return made((cost, sold), text, p, lines, 0)
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
    return made((n, cost, broken, price), text, income - cost, lines, 1)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"Before {b} was added there were {c} - {b} = {c - b}.",
                 f"Before the multiplication there were {c - b} / {a} = {x}.")
    else:
        lines = (f"Let x be the number asked for. Then {a}x + {b} = {c}.", f"So {a}x is {c} - {b} = {c - b}.",
                 f"And x is {c - b} / {a} = {x}.")
    return made((a, b, c), text, x, lines, way)


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
    return made((b, a, d, c), text, tex(x), lines, 0)


def consecutive(rng: random.Random) -> Item:
    """The sum of k consecutive (even, odd) integers."""
    kind, step = rng.choice((("integers", 1), ("even integers", 2), ("odd integers", 2)))
    way = 0 if rng.random() < 0.5 else 1
    k = rng.choice((3, 5, 7)) if way == 0 else rng.choice((3, 4, 5, 6))
    first = rng.randint(4, 90)
    first += {"integers": 0, "even integers": first % 2, "odd integers": 1 - first % 2}[kind]
    last = first + step * (k - 1)
    total = k * (first + last) // 2
    word, answer = rng.choice((("smallest", first), ("largest", last)))
    text = rng.choice((
        f"The sum of {k} consecutive {kind} is {total}. What is the {word} of them?",
        f"If {k} consecutive {kind} add up to {total}, what is the {word} of these numbers?"))
    if way == 0:
        middle, reach = total // k, step * (k - 1) // 2
        lines = (f"The middle number is the average, {total} / {k} = {middle}.",
                 f"The {word} number is {step} * {(k - 1) // 2} = {reach} away.",
                 f"So it is {middle} {'-' if word == 'smallest' else '+'} {reach} = {answer}.")
    else:
        extra = step * k * (k - 1) // 2
        lines = (f"Let x be the smallest number; the numbers are x up to x + {step * (k - 1)} in steps of {step}.",
                 f"Their sum is {k}x + {extra} = {total}.", f"So x is ({total} - {extra}) / {k} = {first}.")
        lines += () if word == "smallest" else (f"The largest number is {first} + {step * (k - 1)} = {last}.",)
    return made((k, total), text, answer, lines, way)


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
        return made((older, t, k), text, young, lines, 0)
    total = young * (k + 1) + 2 * t
    text = rng.choice((
        f"{x} is {k} times as old as {y}. In {t} years the sum of their ages will be {total}. How old is {x} now?",
        f"The age of {x} is {k} times the age of {y}. In {t} years their ages will add up to {total}. How many years "
        f"old is {x} today?"))
    lines = (f"Both grow older by {t} years, so now the ages add up to {total} - 2 * {t} = {total - 2 * t}.",
             f"That is {k} + 1 = {k + 1} times the age of {y}, who is {total - 2 * t} / {k + 1} = {young}.",
             f"So {x} is {k} * {young} = {k * young}.")
    return made((k, t, total), text, k * young, lines, 1)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"If all were {small}, there would be {few} * {n} = {few * n} {part}.",
                 f"That is {total} - {few * n} = {total - few * n} too few.",
                 f"Each of the {large} adds {many} - {few} = {many - few}, so there are {total - few * n} / "
                 f"{many - few} = {b} {large}.")
    else:
        lines = (f"Let a be the number of {small} and b the number of {large}: a + b = {n} and {few}a + {many}b = "
                 f"{total}.",
                 f"Subtracting {few} times the first equation leaves {signed(((many - few, 'b'),))} = {total} - {few} "
                 f"* {n} = {total - few * n}.",
                 f"So b is {total - few * n} / {many - few} = {b}.")
    return made((n, total), text, b, lines, way)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"In one hour they do 1/{a} + 1/{b} = {Fraction(a + b, a * b)} of the job.",
                 f"The whole job takes 1 / ({Fraction(a + b, a * b)}) = {time} hours.")
    else:
        units = math.lcm(a, b)
        lines = (f"Let the job have {units} equal units, a common multiple of both times.",
                 f"In one hour they do {units} / {a} + {units} / {b} = {units // a + units // b} units.",
                 f"The whole job takes {over(units, units // a + units // b)} hours.")
    return made((a, b), text, tex(time), lines, way)


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
        return made((d, v, e, w), text, tex(mean), lines, 0)
    s_text, t_text = (f"{n} hour" + "s" * (n > 1) for n in (s, t))
    text = rng.choice((
        f"{name} drives for {s_text} at {v} kilometers per hour and then for {t_text} at {w} kilometers per hour. "
        f"What is the average speed of the whole trip in kilometers per hour? Give the exact value.",
        f"A train travels for {s_text} at {v} miles per hour and after that for {t_text} at {w} miles per hour. Find "
        f"its average speed in miles per hour, as an exact value."))
    lines = (f"The distances are {v} * {s} = {d} and {w} * {t} = {e}, together {d} + {e} = {d + e}.",
             f"The time is {s} + {t} = {s + t} hours.", f"The average speed is {over(d + e, s + t)}.")
    return made((s, v, t, w), text, tex(mean), lines, 1)


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
        return made((gap, v, w), text, tex(time), lines, 0)
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
    return made((v, head, w), text, tex(time), lines, 1)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"From midnight, the start is {h} * 60 + {m} = {start} minutes.",
                 f"The end is {g} * 60 + {n} = {end} minutes.",
                 f"The difference is {end} - {start} = {end - start} minutes.")
    else:
        lines = (f"From {first} to the next full hour it takes 60 - {m} = {60 - m} minutes.",
                 f"From then to {g - 12}:00 PM there are {g} - {h + 1} = {g - h - 1} full hours, that is {g - h - 1} "
                 f"* 60 = {(g - h - 1) * 60} minutes.",
                 f"Then {n} more minutes: {60 - m} + {(g - h - 1) * 60} + {n} = {end - start}.")
    return made((h, m, g - 12, n), text, end - start, lines, way)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        half = around // 2
        lines = (f"Length and width add up to {around} / 2 = {half} and differ by {more}.",
                 f"The width is ({half} - {more}) / 2 = {width} and the length is {width} + {more} = {length}.",
                 f"The area is {length} * {width} = {area}.")
    else:
        lines = (f"Let w be the width. The perimeter is 2(w + w + {more}), so 4w + {2 * more} = {around}.",
                 f"So w is ({around} - {2 * more}) / 4 = {width}, and the length is {width} + {more} = {length}.",
                 f"The area is {length} * {width} = {area}.")
    return made((more, around), text, area, lines, way)


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
    return made((a, b), text, answer, lines, 0)


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
    return made((k, more), text, largest, lines, 0)


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
    return made((a, b), text, answer, lines, 0)


# -------------------------------------------------------------------------------------------------------- number theory


def greatest_divisor(rng: random.Random) -> Item | None:
    """A story that asks for a greatest common divisor."""
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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        common = primes(g)
        lines = (f"Factor both: {a} = {power_text(primes(a))} and {b} = {power_text(primes(b))}.",
                 f"The common prime powers give {power_text(common)} = {g}.")
    else:
        lines, m, n = (), a, b
        while n:
            lines += (f"Dividing {m} by {n} leaves the remainder {m % n}: {m} - {m // n} * {n} = {m % n}.",)
            m, n = n, m % n
        lines += (f"The last divisor is {g}.",)
    return made((a, b), text, g, lines, way)


def least_multiple(rng: random.Random) -> Item | None:
    """A story that asks for a least common multiple."""
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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"Factor both: {a} = {power_text(primes(a))} and {b} = {power_text(primes(b))}.",
                 f"The highest power of each prime gives {power_text(primes(least))} = {least}.")
    else:
        tried = ", ".join(str(b * i) for i in range(1, least // b + 1))
        lines = (f"The multiples of {b} are {tried} and so on.",
                 f"The first of them that {a} divides is {least}: {least} / {a} = {least // a}.")
    return made((a, b), text, least, lines, way)


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
    return made((r, m, s, n), text, answer, lines, 0)


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
    return made((base, exponent), text, cycle[place - 1], lines, 0)


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
    return made((n,), text, count, lines, 0)


def count_multiples(rng: random.Random) -> Item:
    """How many multiples lie in a range."""
    k, low = rng.randint(3, 17), rng.randint(20, 300)
    high = low + rng.randint(60, 500)
    answer = high // k - (low - 1) // k
    text = rng.choice((
        f"How many integers from {low} to {high}, inclusive, are divisible by {k}?",
        f"The tickets of a raffle are numbered from {low} to {high}. Every ticket whose number is a multiple of {k} "
        f"wins a prize. How many tickets win?"))
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        up, below = high // k, (low - 1) // k
        lines = (f"Up to {high} there are {up} multiples, since {up} * {k} = {up * k} is the last one.",
                 f"Up to {low - 1} there are {below}, since {below} * {k} = {below * k} is the last one.",
                 f"The difference is {up} - {below} = {answer}.")
    else:
        first, last = -(-low // k) * k, high // k * k
        lines = (f"The first multiple in the range is {first // k} * {k} = {first}, the last is {last // k} * {k} = "
                 f"{last}.",
                 f"There are ({last} - {first}) / {k} + 1 = {answer} of them.")
    return made((low, high, k), text, answer, lines, way)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"Each of {n} has {n} - 1 = {n - 1} partners, and each pair is counted twice: {n} * {n - 1} / 2 = "
                 f"{each} pairs.",
                 f"With {k} for each pair that is {each} * {k} = {answer}.")
    else:
        lines = (f"The first has {n - 1} partners, the next {n - 2} new ones, and so on down to 1.",
                 f"The sum of the integers from 1 to {n - 1} is ({n - 1} + 1) * {n - 1} / 2 = {each}.",
                 f"With {k} for each pair that is {each} * {k} = {answer}.")
    return made((n, k), text, answer, lines, way)


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
    return made((n, m, k, j), text, x * y, lines, 0)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"There are {r} + {b} = {n} in all. The first one fits with probability {r}/{n}.",
                 f"Then {r - 1} of {n - 1} are left that fit, so the second one fits with probability {r - 1}/{n - 1}.",
                 f"The product is {r}/{n} * {r - 1}/{n - 1} = {both}.")
    else:
        good, total = math.comb(r, 2), math.comb(n, 2)
        lines = (f"There are {r} + {b} = {n} in all and {n} * {n - 1} / 2 = {total} pairs, all equally likely.",
                 f"The pairs that fit number {r} * {r - 1} / 2 = {good}.", f"The probability is {over(good, total)}.")
    return made((r, b), text, tex(both), lines, way)


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
    return made((n, s), text, tex(Fraction(ways, n * n)), lines, 0)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"The last term is {first} + ({n} - 1) * {step} = {last}.",
                 f"The sum is ({first} + {last}) * {n} / 2 = {total}.")
    else:
        extra = step * n * (n - 1) // 2
        lines = (f"Without the growth the sum would be {n} * {first} = {n * first}.",
                 f"The growth adds {step} times the sum from 1 to {n - 1}: {step} * {n} * {n - 1} / 2 = {extra}.",
                 f"Together that is {n * first} + {extra} = {total}.")
    return made((first, step, n), text, total, lines, way)


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
    return made(terms, text, answer, lines, 0)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"Let x be the added amount. The pure parts satisfy {weak} * {volume} + {strong}x = "
                 f"{target}({volume} + x).",
                 f"The x terms differ by {strong} - {target} = {strong - target} times x, and the constants by "
                 f"({target} - {weak}) * {volume} = {(target - weak) * volume}.",
                 f"So x is {(target - weak) * volume} / {strong - target} = {added}.")
    else:
        lines = (f"The given part lies {target} - {weak} = {target - weak} points below the target, the added part "
                 f"{strong} - {target} = {strong - target} points above it.",
                 f"The amounts balance, so the added amount is {volume} * {target - weak} / {strong - target} = "
                 f"{added}.")
    return made((weak, target, strong, volume), text, added, lines, way)


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
    way = 0 if rng.random() < 0.5 else 1
    if way == 0:
        lines = (f"At least one applies to {a} + {b} - {both} = {a + b - both}, because those with both were counted "
                 "twice.",
                 f"Neither applies to {n} - {a + b - both} = {none}.")
    else:
        lines = (f"Only the first applies to {a} - {both} = {only_a}, only the second to {b} - {both} = {only_b}.",
                 f"Together with the overlap that is {only_a} + {only_b} + {both} = {a + b - both}.",
                 f"Neither applies to {n} - {a + b - both} = {none}.")
    return made((n, a, b, both), text, none, lines, way)


def named(*families: Family) -> dict[str, Family]:
    """{name: family}: the name in the rows' ids is the function's, with dashes."""
    return {family.__name__.replace("_", "-"): family for family in families}


TRAINED = named(
    one_step, change, packs, unit_rate, percent_rest, reverse_percent, average_needed, unit_conversion, ratio_share,
    fraction_left, discount_tax, profit, linear_undo, linear_both_sides, consecutive, ages, heads_legs, work_together,
    two_legs, meet_or_chase, elapsed_time, rectangle_area, right_triangle, triangle_angles, product_expression,
    greatest_divisor, least_multiple, two_remainders, units_digit, divisor_count, count_multiples, pairs, committee,
    draw_two, dice_sum, arithmetic_sum, nth_term,
)
HELD_OUT = named(mixture, neither)


# ------------------------------------------------------------------------------------------------------------ the files


def draw(name: str, family: Family, seed: int, count: int) -> list[dict]:
    """`count` rows of one family, no two with the same operands. ValueError if the family cannot give that many."""
    rng = random.Random(f"{seed}-{name}")  # a stream per family: adding a family leaves the others' rows as they are
    rows, used = [], set()
    for _ in range(MAX_DRAWS):
        if len(rows) == count:
            return rows
        item = family(rng)
        if item is None:
            continue
        operands, problem, answer, solution, way = item
        key = tuple(sorted(map(str, operands)))  # in any order: 3:5 in train and 5:3 in test would be too close
        if key in used:
            continue
        used.add(key)
        rows.append({"id": f"starter-{name}-{len(rows) + 1}", "problem": problem, "answer": answer,
                     "solution": solution, "strategy": STRATEGIES[name][way]})
    raise ValueError(f"family {name}: only {len(rows)} of {count} rows after {MAX_DRAWS} draws")


def build(seed: int) -> dict[str, list[dict]]:
    """The rows of train, test and heldout. The families take turns, so any prefix of a file is a fair sample of them."""
    drawn = [draw(name, family, seed, TRAIN_ROWS + TEST_ROWS) for name, family in TRAINED.items()]
    held = [draw(name, family, seed, HELDOUT_ROWS) for name, family in HELD_OUT.items()]
    return {
        "train": [rows[k] for k in range(TRAIN_ROWS) for rows in drawn],
        "test": [rows[k] for k in range(TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS) for rows in drawn],
        "heldout": [rows[k] for k in range(HELDOUT_ROWS) for rows in held],
    }


def with_strategy(row: dict) -> dict:
    """The row with its strategy inside the problem's text, so that its prompt is the row's guided prompt, to the letter."""
    prompt = guided_messages(row["problem"], Strategy.from_dict(row["strategy"]))[-1]["content"]
    text = prompt.removesuffix(DEFAULT.prompt.removeprefix("{problem}"))  # what every prompt adds after the problem
    return {"id": f"{row['id']}-guided", "problem": text, "answer": row["answer"], "solution": row["solution"]}


def build_transfer(alone: Sequence[str], guided: Sequence[str], counts: Sequence[int], seed: int) -> dict[str, list[dict]]:
    """Rows that teach to follow the strategies of all families, and to do without them only in the families `alone`.

    warm        for SFT: all families with the strategy in the problem's text, and those of `alone` a second time without it
    rl, test    other rows of the families `guided`, no two with the same operands; test_alone: the same of `alone`
    counts      rows a family in warm, rl and test
    """
    drawn = {name: draw(name, TRAINED[name], seed, sum(counts)) for name in (*alone, *guided)}
    warm, rl, end = range(counts[0]), range(counts[0], counts[0] + counts[1]), range(counts[0] + counts[1], sum(counts))
    return {
        "warm": [with_strategy(rows[k]) for k in warm for rows in drawn.values()]
        + [drawn[name][k] for k in warm for name in alone],
        "rl": [drawn[name][k] for k in rl for name in guided],
        "test": [drawn[name][k] for k in end for name in guided],
        "test_alone": [drawn[name][k] for k in end for name in alone],
    }


def same_plan(response: str, row: dict) -> float:
    """A reward for --reward: 1 if the response has the words of the row's solution, whatever its numbers are.

    It pays for the approach alone, for models that are too small for the arithmetic. The sentence with the answer is left out.
    """
    plans = [re.sub("[^A-Za-z]+", " ", text.partition("The answer")[0]).strip() for text in (response, row["solution"])]
    return float(plans[0] == plans[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the starter set: train.jsonl, test.jsonl and heldout.jsonl.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="the committed files have 0 (default: 0)")
    parser.add_argument("--alone", nargs="+", choices=TRAINED, help="families that the warm-up shows with and without strategy")
    parser.add_argument("--guided", nargs="+", choices=TRAINED, help="families that it shows with it only; RL gets these")
    parser.add_argument("--rows", nargs=3, type=int, metavar=("WARM", "RL", "TEST"), help="rows a family, with --guided")
    args = parser.parse_args()
    transfer = (args.alone, args.guided, args.rows)
    if any(transfer) and not (all(transfer) and set(args.alone).isdisjoint(args.guided)):
        parser.error("--alone, --guided and --rows go together, and no family is both")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (build_transfer(*transfer, args.seed) if args.guided else build(args.seed)).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system
        print(f"{args.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
