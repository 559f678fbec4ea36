"""Normalisation of short answers: the VQAv2 script and the EvalAI processor.

Both are reproduced with their quirks, since published numbers contain them. Source:
the VQA evaluation code of visualqa.org and the EvalAI processor of Pythia and LLaVA.
"""

from __future__ import annotations

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
# The script passes a flag where `re.sub` takes the count, which is 32 for re.UNICODE.
_PERIODS_DELETED = 32
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}


def official(text: str) -> str:
    """The steps of the VQAv2 script that follow its guard: punctuation, then words.

    Line breaks and tabs are spaces; see `whitespace` for what precedes the guard.
    """
    return _words(_punctuation(whitespace(text), re.compile(r"\d,\d")))


def evalai(text: str) -> str:
    """The EvalAI processor: lower case, commas and question marks out, then as above.

    Used for TextVQA and VizWiz, and by LLaVA before an upload of VQAv2 answers.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(whitespace(text), _COMMA_IN_NUMBER))


def whitespace(text: str) -> str:
    """Line breaks and tabs to spaces, ends stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str, comma: re.Pattern[str]) -> str:
    result = text
    in_number = comma.search(text) is not None
    for mark in _MARKS:
        # Adjacency is read from the original text, also after earlier replacements.
        at_a_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_a_space or in_number else " ")
    return _PERIOD.sub("", result, count=_PERIODS_DELETED)


def _words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    kept = (CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
    return " ".join(kept)


# The official table. Keys with a capital never match a lower-cased word and some words
# map to themselves or oddly; all of it is part of the metric.
_TABLE = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't
couldn'tve=couldn't've couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't
hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd
hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's Id've=I'd've
I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've
itll=it'll let's=let's maam=ma'am mightnt=mightn't mightnt've=mightn't've
mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've neednt=needn't
notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at
'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've she's=she's
shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've
somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've
somebodyll=somebody'll somebodys=somebody's someoned=someone'd someoned've=someone'd've
someone'dve=someone'd've someonell=someone'll someones=someone's somethingd=something'd
somethingd've=something'd've something'dve=something'd've somethingll=something'll
thats=that's thered=there'd thered've=there'd've there'dve=there'd've therere=there're
theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll
theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've
weve=we've werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've
whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've
who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're
whys=why's wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've
wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've
y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've
youll=you'll youre=you're youve=you've
"""
CONTRACTIONS = dict(pair.split("=") for pair in _TABLE.split())
