"""The demo's batch: 40 short prompts of eight kinds, each kind liking other experts of the bundled model."""

from __future__ import annotations

PROMPTS_BY_DOMAIN: dict[str, tuple[str, ...]] = {
    "verse": (
        "And it came to pass, when the king heard these words, that he",
        "The LORD is my shepherd; I shall not",
        "And the children of Israel went out of",
        "A soft answer turneth away wrath: but",
        "Then said Jesus unto his disciples,",
    ),
    "python": (
        "def read_lines(path):\n    with open(path) as f:\n        return",
        "class Queue:\n    def __init__(self, maxsize=0):\n        self.",
        "import os\nimport sys\n\ndef main(argv):\n",
        "    for key, value in self.items():\n        if",
        "    try:\n        value = int(text)\n    except",
    ),
    "c": (
        "#ifndef _NET_IF_H\n#define _NET_IF_H\n\n#include",
        "struct list_node {\n  struct list_node *next;\n",
        "typedef enum {\n",
        "extern int pthread_mutex_lock (",
        "/* Return the number of bytes",
    ),
    "kernel": (
        "The scheduler keeps a list of runnable tasks and",
        "This driver supports the following devices:\n\n",
        "When a page is written back to disk, the filesystem",
        "Memory barriers are needed when",
        "To enable this option at boot time, pass",
    ),
    "dictionary": (
        "harbor (noun):",
        "swift (adj):",
        "gather (verb):",
        "oak tree (noun):",
        "quickly (adv):",
    ),
    "german": (
        "Die Datei wird nur dann gelesen, wenn",
        "Dieser Befehl gibt eine Liste der",
        "Der Benutzer kann die Option",
        "Wenn das Verzeichnis nicht existiert,",
        "Siehe auch die Handbuchseite",
    ),
    "french": (
        "Cette commande affiche la liste des",
        "Le fichier de configuration est lu",
        "Si l'option est absente, la valeur",
        "L'utilisateur peut modifier",
        "Voir aussi la page de manuel de",
    ),
    "arithmetic": (
        "12 + 30 = 42\n7 * 8 =",
        "53 - 20 = 33\n45 + 54 =",
        "9 * 9 = 81\n6 * 7 =",
        "80 + 19 = 99\n31 - 11 =",
        "25 + 25 = 50\n10 * 10 =",
    ),
}
