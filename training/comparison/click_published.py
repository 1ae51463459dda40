"""What the IMN paper reports of click models, by display name."""

# Table 1, AUC on Amazon Books.
BOOKS_AUC = {
    "youtube_dnn": 0.8374,
    "din": 0.8516,
    "dien": 0.8550,
    "sasrec": 0.8214,
    "mimn": 0.8523,
    "ubr4ctr": 0.8570,
    "imn_2p": 0.8498,
    "imn_3p": 0.8672,
    "imn_3p_plus": 0.8692,
}
BOOKS_SIZE = "295,982 users, 647,589 items"

# Figure 4, peak memory of training in GiB by history length, as the code of its authors plots it;
# what is missing ran out of memory.
MEMORY_GIB: dict[str, dict[int, float]] = {
    "youtube_dnn": {50: 0.496, 100: 0.496, 200: 0.496, 500: 0.496, 1000: 0.63},
    "din": {50: 0.62, 100: 0.62, 200: 0.62, 500: 0.754, 1000: 1.037},
    "dien": {50: 0.632, 100: 0.632, 200: 1.438, 500: 8.95, 1000: 11.23},
    "sasrec": {50: 1.425, 100: 2.637, 200: 8.4, 500: 14.67},
    "mimn": {50: 0.632, 100: 0.632, 200: 7.68, 500: 12.45},
    "ubr4ctr": {50: 0.498, 100: 0.498, 200: 0.907, 500: 2.52, 1000: 4.659},
    "imn_3p": {50: 0.63, 100: 0.63, 200: 0.63, 500: 0.899, 1000: 1.44},
}
