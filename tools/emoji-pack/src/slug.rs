//! Names in one spelling, so that the vendors' names can be compared.

/// Turns a name into kebab-case ASCII: `Person: blond hair` to `person-blond-hair`.
///
/// Accents are taken off, apostrophes vanish, `#`, `*` and `&` become words, everything else that
/// is neither a letter nor a digit parts two words.
pub fn slug(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut word = String::new();
    let flush = |word: &mut String, out: &mut String| {
        if !word.is_empty() {
            if !out.is_empty() {
                out.push('-');
            }
            out.push_str(word);
            word.clear();
        }
    };
    for c in name.chars().flat_map(char::to_lowercase) {
        match c {
            'a'..='z' | '0'..='9' => word.push(c),
            '\'' | '’' | '‘' | '“' | '”' | '"' | '.' | '!' => {}
            '#' => {
                flush(&mut word, &mut out);
                out.push_str(if out.is_empty() { "pound" } else { "-pound" });
            }
            '*' => {
                flush(&mut word, &mut out);
                out.push_str(if out.is_empty() { "asterisk" } else { "-asterisk" });
            }
            '&' => {
                flush(&mut word, &mut out);
                out.push_str(if out.is_empty() { "and" } else { "-and" });
            }
            _ => match plain(c) {
                Some(letter) => word.push(letter),
                None => flush(&mut word, &mut out),
            },
        }
    }
    flush(&mut word, &mut out);
    out
}

/// The slug without its hyphens, for vendors that write names in one word.
pub fn squash(name: &str) -> String {
    slug(name).replace('-', "")
}

/// The plain letter of an accented one, for the letters that occur in emoji names.
fn plain(c: char) -> Option<char> {
    Some(match c {
        'á' | 'à' | 'â' | 'ã' | 'ä' | 'å' => 'a',
        'ç' => 'c',
        'é' | 'è' | 'ê' | 'ë' => 'e',
        'í' | 'ì' | 'î' | 'ï' => 'i',
        'ñ' => 'n',
        'ó' | 'ò' | 'ô' | 'õ' | 'ö' => 'o',
        'ú' | 'ù' | 'û' | 'ü' => 'u',
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_joined_by_hyphens() {
        assert_eq!(slug("grinning face"), "grinning-face");
        assert_eq!(slug("GRINNING FACE"), "grinning-face");
        assert_eq!(slug("person: blond hair"), "person-blond-hair");
        assert_eq!(slug("  eight_spoked  asterisk "), "eight-spoked-asterisk");
    }

    #[test]
    fn signs_and_accents_become_plain() {
        assert_eq!(slug("woman’s hat"), "womans-hat");
        assert_eq!(slug("eight o'clock"), "eight-oclock");
        assert_eq!(slug("keycap: #"), "keycap-pound");
        assert_eq!(slug("keycap: *"), "keycap-asterisk");
        assert_eq!(slug("piñata"), "pinata");
        assert_eq!(slug("UP! button"), "up-button");
        assert_eq!(slug("Japanese “here” button"), "japanese-here-button");
        assert_eq!(slug("A & B"), "a-and-b");
    }

    #[test]
    fn a_squashed_name_is_one_word() {
        assert_eq!(squash("DANCE-club stage"), "danceclubstage");
        assert_eq!(squash("!"), "");
    }
}
