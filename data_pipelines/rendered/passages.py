"""Short English passages for rendered documents and text samples: public-domain classics, and sentences of our own.

All classics were published before 1902, and their authors and translators died before 1947; a few are shortened by some words. A passage belongs to one split only.
"""

from __future__ import annotations

import functools
import re

from data_pipelines.rendered.pictures import HELD_OUT

_CLASSICS = (
    # Abraham Lincoln, address at Gettysburg, 1863
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and dedicated to the proposition that all men are created equal. "
    "Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great battle-field of that war. "
    "We have come to dedicate a portion of that field, as a final resting place for those who here gave their lives that that nation might live. It is altogether fitting and proper that we should do this.",
    # Thomas Jefferson and others, Declaration of Independence, 1776
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which have connected them with another, and to assume among the powers of the earth, "
    "the separate and equal station to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind requires that they should declare the causes which impel them to the separation.",
    # Lewis Carroll, Alice's Adventures in Wonderland, 1865
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice she had peeped into the book her sister was reading, "
    "but it had no pictures or conversations in it, and what is the use of a book, thought Alice, without pictures or conversations?",
    # Herman Melville, Moby-Dick, 1851
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and nothing particular to interest me on shore, "
    "I thought I would sail about a little and see the watery part of the world. It is a way I have of driving off the spleen and regulating the circulation.",
    # Charles Dickens, A Tale of Two Cities, 1859
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it was the epoch of belief, it was the epoch of incredulity, "
    "it was the season of Light, it was the season of Darkness, it was the spring of hope, it was the winter of despair.",
    # Jane Austen, Pride and Prejudice, 1813
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. However little known the feelings or views of such a man may be "
    "on his first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other of their daughters.",
    # Preamble of the Constitution of the United States, 1787
    "We the People of the United States, in Order to form a more perfect Union, establish Justice, insure domestic Tranquility, provide for the common defence, promote the general Welfare, "
    "and secure the Blessings of Liberty to ourselves and our Posterity, do ordain and establish this Constitution for the United States of America.",
    # William Shakespeare, Sonnet 18, 1609
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: Rough winds do shake the darling buds of May, And summer's lease hath all too short a date.",
    # William Shakespeare, Hamlet, about 1600
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer the slings and arrows of outrageous fortune, or to take arms against a sea of troubles, and by opposing end them.",
    # Arthur Conan Doyle, A Scandal in Bohemia, 1891
    "To Sherlock Holmes she is always the woman. I have seldom heard him mention her under any other name. In his eyes she eclipses and predominates the whole of her sex.",
    # Percy Bysshe Shelley, Ozymandias, 1818
    "I met a traveller from an antique land, who said: Two vast and trunkless legs of stone stand in the desert. Near them, on the sand, half sunk a shattered visage lies.",
    # Edgar Allan Poe, The Raven, 1845
    "Once upon a midnight dreary, while I pondered, weak and weary, over many a quaint and curious volume of forgotten lore, while I nodded, nearly napping, suddenly there came a tapping, "
    "as of some one gently rapping, rapping at my chamber door.",
    # William Wordsworth, I Wandered Lonely as a Cloud, text of 1815
    "I wandered lonely as a cloud that floats on high o'er vales and hills, when all at once I saw a crowd, a host, of golden daffodils; beside the lake, beneath the trees, fluttering and dancing in the breeze.",
    # Robert Louis Stevenson, Bed in Summer, 1885
    "In winter I get up at night and dress by yellow candle-light. In summer, quite the other way, I have to go to bed by day. I have to go to bed and see the birds still hopping on the tree.",
    # Mark Twain, The Adventures of Tom Sawyer, 1876
    "Tom appeared on the sidewalk with a bucket of whitewash and a long-handled brush. He surveyed the fence, and all gladness left him and a deep melancholy settled down upon his spirit. Thirty yards of board fence nine feet high.",
    # Emily Dickinson, 1890
    "Because I could not stop for Death, he kindly stopped for me; the carriage held but just ourselves and immortality.",
    # William Blake, Songs of Experience, 1794
    "Tyger Tyger, burning bright, in the forests of the night; what immortal hand or eye, could frame thy fearful symmetry?",
    # Abraham Lincoln, second inaugural address, 1865
    "With malice toward none, with charity for all, with firmness in the right as God gives us to see the right, let us strive on to finish the work we are in, to bind up the nation's wounds.",
    # Leo Tolstoy, Anna Karenina, translated by Constance Garnett, 1901
    "Happy families are all alike; every unhappy family is unhappy in its own way. Everything was in confusion in the house.",
    # Samuel Taylor Coleridge, Kubla Khan, 1816
    "In Xanadu did Kubla Khan a stately pleasure-dome decree: where Alph, the sacred river, ran through caverns measureless to man down to a sunless sea.",
)

_OWN = (
    "The library opens at nine in the morning and closes at six. Please return the books on time and leave the chairs as you found them. The reading room on the second floor is quiet.",
    "Wash the apples, cut them into small pieces and put them in a pan with a little water. Add sugar and a pinch of salt. Let the pan stand on a low fire until the fruit is soft.",
    "The train to the coast leaves from the third platform. It stops at every village along the river, so take a seat on the left side and look at the bridges and the old mills.",
    "Our garden is long and narrow. In the spring the cherry tree is white, and in the autumn the leaves cover the path. Two cats sleep under the bench when the sun is out.",
    "The meeting begins with a short report on the last quarter. After that we talk about the new office, the plan for the winter and the order of the remaining work.",
    "Keep this paper with your ticket. The guard at the gate will ask for both. Bags and coats can be left at the desk near the entrance without any charge.",
    "A warm wind came from the south and the snow began to melt. By the evening the road was full of water, and the children made small boats out of paper and wood.",
    "Pay the amount within thirty days. Write the number of this letter on the form so that we can find your order. Call us if anything is not clear.",
    "The map shows four hills and a lake. A thin line marks the path from the village to the tower. It is a walk of two hours, and there is a well half way.",
    "Every morning the baker puts six loaves in the window. By noon five of them are gone. The last one he keeps for the teacher, who always comes late.",
    "The machine counts the coins and puts them into paper rolls. A red lamp means that a roll is full. Press the green button to start it again.",
    "The old clock in the hall is slow. It loses ten minutes a day, so my father sets it right after dinner and says that time has waited for us again.",
    "Rain fell on the harbour all night. At dawn three ships were still there, their flags wet and heavy, and a boy with a lantern walked along the wall.",
    "Put a blank sheet on the glass and close the lid. Choose the size and the number of copies, then wait for the short sound before you take the paper out.",
    "She wrote the address on the envelope in large letters, because the last letter had come back. Then she put on her coat and walked to the post office.",
)

PASSAGES = _CLASSICS + _OWN
_HELD_OUT_EVERY = 5


@functools.cache
def passages(split: str) -> tuple[str, ...]:
    """The passages of a split: every fifth is held out, the others are for training."""
    return tuple(text for index, text in enumerate(PASSAGES) if (index % _HELD_OUT_EVERY == 0) is (split == HELD_OUT))


@functools.cache
def sentences(split: str) -> tuple[str, ...]:
    """The sentences of a split's passages."""
    return tuple(sentence for text in passages(split) for sentence in re.split(r"(?<=[.?!;:]) +", text))
